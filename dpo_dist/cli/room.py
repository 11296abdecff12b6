"""Where memory runs out: which settings would have left room for the step, by what was measured at the start."""

from typing import Any

from dpo_dist.cli.ending import WITHOUT_RECOMPUTATION
from dpo_dist.cli.prepare import Prepared
from dpo_dist.cli.recomputing import Recomputation, can_recompute
from dpo_dist.config import PackingConfig
from dpo_dist.engine import ActivationMemory
from dpo_dist.packing import input_tokens_of

# The measurement told that the step fits, and it did not: what is named is to take so much less of activations.
_LESS = 0.85


def more_room(prepared: Prepared, found: Recomputation, num_devices: int) -> str:
    """What a run that is out of memory could change; empty: the general advice says it.

    Args:
        prepared: the run.
        found: what `settle_recomputation` gave.
        num_devices: of the run.
    """
    if found.memory is None:
        return "" if found.count < found.num_layers and can_recompute(prepared) else WITHOUT_RECOMPUTATION
    longest = int(max(input_tokens_of(prepared.dataset, prepared.sharing[0])))
    file = _sharding_more(prepared.config.parallel.deepspeed, prepared.deepspeed, num_devices)
    return ways_out(found, found.memory, longest, prepared.config.packing, file)


def ways_out(found: Recomputation, memory: ActivationMemory, longest: int, packing: PackingConfig, file: str) -> str:
    """The settings, with values that would have fitted.

    Args:
        found: as above.
        memory: what was measured for it.
        longest: tokens of the longest example, which is never split.
        packing: as configured.
        file: for DeepSpeed, which takes less; empty: there is none.
    """
    fewer, fewest = (_fitting(memory, found, count) for count in (found.count, found.num_layers))
    ways = []
    if fewer >= longest:
        # A forward pass without gradient takes less than one with it, so what fits there fits here.
        of_reference = min(fewer, int(_LESS * (packing.reference_max_tokens or 2 * packing.max_tokens)))
        reference = f" or, if it was the reference or an evaluation, packing.reference_max_tokens to {of_reference}"
        ways.append(f"lower packing.max_tokens to {fewer}{reference if of_reference >= longest else ''}")
    if found.count < found.num_layers and fewest >= longest:
        fits = min(fewest, packing.max_tokens)
        ways.append(f"set model.gradient_checkpointing=true, which leaves room for packing.max_tokens={fits}")
    if file:
        ways.append(f"set parallel.deepspeed={file}")
    if fewer < longest:
        ways.append(f"set data.max_length: the longest example has {longest} tokens, and {fewer} fit")
    return ", or ".join(ways)


def _fitting(memory: ActivationMemory, found: Recomputation, count: int) -> int:
    """Tokens of a micro-batch that fits where `count` layers recompute; less than those of the one that did not."""
    now, then = (memory.needed(1, layers) - memory.fixed for layers in (found.count, count))
    return min(memory.most_tokens(found.free, count), int(_LESS * found.tokens * now / then))


def _sharding_more(own: str, config: dict[str, Any], num_devices: int) -> str:
    """A file of deepspeed_configs that takes less than a run's own; empty where there is none.

    Where gradients are summed in float32 they stay so: who follows the advice must not lose precision unawares.
    """
    zero, accumulated = config.get("zero_optimization", {}), config.get("data_types", {}).get("grad_accum_dtype")
    ending = "_bf16" if "fp32" in (config.get("communication_data_type"), accumulated) else ""
    if num_devices > 1 and zero.get("stage", 0) < 3:
        return "zero3_cpu" if own.endswith("_cpu") else f"zero3{ending}"
    offloads_all = {"offload_param", "offload_optimizer"} <= zero.keys()
    return "" if own.endswith("_cpu") or offloads_all else f"zero3_offload{ending}"
