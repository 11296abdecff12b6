"""`model.gradient_checkpointing=auto`: as few layers compute activations again as the memory of all ranks allows."""

import logging
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dpo_dist.batch import build_micro_batch
from dpo_dist.checkpoint import human_bytes
from dpo_dist.cli.prepare import Prepared
from dpo_dist.distributed import Ranks, all_gather_json
from dpo_dist.engine import ActivationMemory, TrainingEngine, measure_activations
from dpo_dist.machine import free_bytes
from dpo_dist.packing import input_tokens_of
from dpo_dist.phases import reach
from dpo_dist.pretrained import adapter_kind

logger = logging.getLogger(__name__)

_MEASURED_TOKENS = 64  # of a prompt, and of each completion: activations grow with the tokens


def wanted_at_loading(prepared: Prepared) -> bool | Literal["auto"]:
    """What a model is loaded with."""
    wanted = prepared.config.model.gradient_checkpointing
    return wanted if wanted != "auto" or can_recompute(prepared) else False


def can_recompute(prepared: Prepared) -> bool:
    """A layer that computes again would not see the prefix of prefix tuning."""
    adapter = prepared.config.adapter
    return not (adapter.is_used and adapter_kind(adapter) == "prefix_tuning")


@dataclass(frozen=True)
class Recomputation:
    """Which layers recompute, and what was measured for it.

    Attributes:
        count: layers that recompute, the first ones.
        num_layers: of all.
        memory: what a micro-batch takes; None where the configuration decides, and nothing is measured.
        tokens: of the largest micro-batch.
        free: bytes, on the fullest device, before the first step.
    """

    count: int
    num_layers: int
    memory: ActivationMemory | None = None
    tokens: int = 0
    free: int = 0


def settle_recomputation(prepared: Prepared, ranks: Ranks, policy: TrainingEngine) -> Recomputation:
    """Decide which layers recompute, and let them. Collective.

    Args:
        prepared: the run.
        ranks: where this process stands. All ranks decide alike, since under ZeRO-3 a layer that computes again gathers
            its weights again.
        policy: before its first update; whatever else takes memory of the device is there.
    """
    num_layers = len(policy.model.switchable_layers)
    wanted = wanted_at_loading(prepared)
    if wanted != "auto" or not num_layers:
        return Recomputation(num_layers if wanted else 0, num_layers)
    reach("activations")
    policy.model.recompute_first(0)
    example = prepared.dataset[0].beginning(_MEASURED_TOKENS)
    memory = measure_activations(policy, build_micro_batch([example], [0], prepared.sharing[0]))
    tokens = _largest_micro_batch(prepared)
    # What a rank keeps of gradients and optimizer differs a little; the fullest device decides.
    fewest = memory.fewest(tokens, free := free_bytes(ranks.device, ranks.ranks_per_node))
    seen = all_gather_json([num_layers if fewest is None else fewest, free])
    count, least = max(one for one, _ in seen), min(free for _, free in seen)
    policy.model.recompute_first(count)
    if ranks.is_first:
        logger.info(_text(memory, tokens, count, least))
    return Recomputation(count, num_layers, memory, tokens, least)


def _largest_micro_batch(prepared: Prepared) -> int:
    """Tokens that no micro-batch of the policy exceeds."""
    tokens = np.sort(input_tokens_of(prepared.dataset, prepared.sharing[0]))
    return min(prepared.config.packing.max_tokens, int(tokens[-prepared.config.train.examples_per_step :].sum()))


def _text(memory: ActivationMemory, tokens: int, count: int, free: int) -> str:
    each = human_bytes(int(memory.needed(tokens, count)))
    room = f"{each} for {tokens} tokens at once, {human_bytes(free)} are free"
    if count == 0:
        return f"activations are kept in all {memory.num_layers} layers: {room}"
    if count < memory.num_layers:
        return f"activations are recomputed in {count} of {memory.num_layers} layers: {room}"
    return f"activations are recomputed in all {memory.num_layers} layers: {room}"
