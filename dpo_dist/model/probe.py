"""An architecture is tried on a small random model before any weight is read: packed, and by its own forward.

A name on a list would not do: what a class does beside its attention, after its last layer, or with its positions is
known for sure from its own numbers alone.
"""

import random
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from dpo_dist.attention.interface import register
from dpo_dist.batch import MicroBatch, build_micro_batch
from dpo_dist.data import Pair
from dpo_dist.errors import ModelError
from dpo_dist.model.liger import without_liger
from dpo_dist.model.scoring import ScoringModel
from dpo_dist.pretrained.folder import first_line
from dpo_dist.pretrained.shrunk import MAX_POSITIONS, shrunk
from dpo_dist.tokenization import TokenizedExample

_ALLOWED = 5e-3  # nats of a token in float32; a token seen too much changes these models by 0.01 to 10


@dataclass(frozen=True)
class Probe:
    """What a small model of an architecture told."""

    untried: str = ""  # why it told nothing: then the start of the run decides; "" where it did
    has_position_table: bool = False  # positions beyond max_position_embeddings do not exist


def try_architecture(config: PretrainedConfig, key: str, share_prompts: bool, trust_remote_code: bool = False) -> Probe:
    """Compare packed log-probabilities with the architecture's own, on a small random model; takes a moment.

    Args:
        config: what `load_config` gave.
        key: the dotted path that its folder was written under.
        share_prompts: what `decide_sharing` gave.
        trust_remote_code: run code that lies in the folder.
    Raises:
        ModelError: the architecture cannot be packed, with the reason.
    """
    refused = f"{key}: architecture {config.model_type} cannot be trained here: "
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not hasattr(config, "auto_map"):
        raise ModelError(f"{refused}transformers has no causal language model of it")
    without_liger()  # of an earlier run of this process: it computes on GPUs only
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            small = shrunk(config)
            _build(small, "eager", trust_remote_code)(input_ids=torch.tensor([[3, 4, 5]]), use_cache=False)
        except Exception as error:
            return Probe(untried=f"{type(error).__name__}: {first_line(error)}")
        try:
            model = ScoringModel(_build(small, register("sdpa"), trust_remote_code))
            for share in {share_prompts, False}:
                difference = _difference(model, share)
                if not difference <= _ALLOWED:
                    raise ModelError(
                        f"{refused}packed log-probabilities differ from those of its own forward by {difference:.2g} "
                        "nats of a token: it does more than attention, norms and one output matrix"
                    )
        except ModelError as error:
            raise ModelError(str(error).replace("model.model_name_or_path", key, 1)) from None
        except Exception as error:
            raise ModelError(f"{refused}{_own_code(error)}") from None
        return Probe(has_position_table=_has_position_table(model.model))


def _build(config: PretrainedConfig, attention: str, trust_remote_code: bool) -> PreTrainedModel:
    model: Any = AutoModelForCausalLM.from_config(
        deepcopy(config), attn_implementation=attention, dtype=torch.float32, trust_remote_code=trust_remote_code
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Vectors start as exact ones and zeros, which would hide a forgotten norm, bias or sink.
            if parameter.dim() < 2 or name.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def _difference(model: ScoringModel, share_prompts: bool) -> float:
    """The largest difference of a token's log-probability, nats."""
    size = model.model.config.get_text_config().vocab_size
    examples = [_example(9, (6, 1, 8), size), _example(1, (3, 7), size), _example(14, (2, 5), size)]
    batch = build_micro_batch(examples, [0, 3, 5], share_prompts)
    packed_M = model(batch)
    alone_M = torch.cat(
        [model(_alone(example, ids), by_itself=True) for example in examples for ids in example.completion_ids]
    )
    return float((packed_M - alone_M).abs().max())


def _alone(example: TokenizedExample, completion_ids: tuple[int, ...]) -> MicroBatch:
    one = replace(example, completion_ids=(completion_ids,), pairs=())
    return build_micro_batch([one], [0], share_prompts=False)


def _example(num_prompt: int, lengths: Sequence[int], vocabulary: int) -> TokenizedExample:
    draw = random.Random(num_prompt)
    ids = [
        tuple(draw.randrange(vocabulary // 2, vocabulary) for _ in range(length)) for length in (num_prompt, *lengths)
    ]
    return TokenizedExample(ids[0], tuple(ids[1:]), (Pair(0, 1),), source="")


def _has_position_table(model: PreTrainedModel) -> bool:
    # Some tables have a few rows more than there are positions.
    beyond = torch.tensor([[MAX_POSITIONS + 16]])
    try:
        with torch.no_grad():
            model.get_decoder()(input_ids=torch.tensor([[3]]), position_ids=beyond, use_cache=False)
    except (IndexError, RuntimeError):
        return True
    return False


def _own_code(error: Exception) -> str:
    return (
        f"its own code does not take a packed micro-batch ({type(error).__name__}: {first_line(error)}); architectures "
        "whose layers call transformers' attention interface do"
    )
