"""The packed forward against the architecture's own, on real weights and the beginning of one example.

The layouts of `proof.py` are the program compared with itself. What a class does beside attention, after its last layer
or with its positions shows here alone.

    M scored tokens   C completions
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from dpo_dist.batch import MicroBatch, RankWork, build_micro_batch
from dpo_dist.errors import DpoDistError, ModelError
from dpo_dist.model import ScoringModel, own_kernel
from dpo_dist.noise import NOISE_PER_SQRT_TOKEN
from dpo_dist.peers import raise_if_peer_lost
from dpo_dist.selfcheck.comparison import Comparison, alone, compare

# Another kernel rounds at other places; "eager" attention in half precision rounds scores before the softmax, and gave
# 3.6 times the noise of two layouts on a 135M model (docs/decisions/0017).
_SLACK, _SLACK_OF_EAGER = 3.0, 12.0
_LIMIT = 32  # tokens of a prompt, and of a completion: what is computed whole is that short


@runtime_checkable
class _Engine(Protocol):
    model: ScoringModel

    @property
    def dtype(self) -> torch.dtype: ...

    def token_logps(self, batch: MicroBatch) -> Float[Tensor, " M"]: ...

    def own_token_logps(self, batch: MicroBatch) -> Float[Tensor, " M"]: ...


@torch.no_grad()
def compare_with_own_forward(engine: _Engine, work: RankWork, positions: Sequence[int]) -> list[Comparison]:
    """Two completions of the shortest of some examples, packed after another example, and alone. Collective.

    Every rank runs one packed forward and two of its class; with nothing to do it runs fillers.

    Args:
        engine: policy or reference.
        work: the rank's share of a step.
        positions: of it, those of its first micro-batch.
    """
    chosen = sorted(positions, key=lambda position: -_num_tokens(work, position))[-2:]
    packed = work.build(chosen, work.share_prompts, _LIMIT)
    packed_M = engine.token_logps(packed)
    packed_C = packed.to(packed_M.device).completion_sums(packed_M, weighted=False)
    is_rough = own_kernel(engine.model.model) == "eager" and engine.dtype in (torch.bfloat16, torch.float16)
    scale = (_SLACK_OF_EAGER if is_rough else _SLACK) * NOISE_PER_SQRT_TOKEN[engine.dtype]
    comparisons = []
    for own in _first_and_last(work, chosen, packed):
        own_M = _ask(engine, own)
        own_C = own.to(own_M.device).completion_sums(own_M)
        comparisons.append(compare(own, own_C, packed, packed_C, scale))
    return comparisons


def _ask(engine: _Engine, own: MicroBatch) -> Float[Tensor, " M"]:
    """The class's own forward; it is somebody else's code, and what it raises says that the model cannot be judged."""
    try:
        return engine.own_token_logps(own)
    except (DpoDistError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise_if_peer_lost(error)
        what = next(iter(str(error).splitlines()), "")
        raise ModelError(
            f"model.model_name_or_path: the architecture's own forward, which packed numbers are held against, fails "
            f"({type(error).__name__}: {what}); its config.json may not belong to it"
        ) from error


def _first_and_last(work: RankWork, chosen: Sequence[int], packed: MicroBatch) -> list[MicroBatch]:
    """The first and the last completion of the last example, each alone."""
    if not chosen:
        return [build_micro_batch([], [], share_prompts=False)] * 2
    example = work.example(chosen[-1]).beginning(_LIMIT)
    count = len(example.completion_ids)
    indices = packed.completion_index_C[-count:]
    return [alone(example, k, int(indices[k])) for k in (0, count - 1)]


def _num_tokens(work: RankWork, position: int) -> int:
    example = work.example(position)
    return len(example.prompt_ids) + max(map(len, example.completion_ids))
