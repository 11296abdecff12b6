"""Where memory runs out: which settings would have left room for the step, by what was measured at the start."""

from dpo_dist.cli.prepare import Prepared
from dpo_dist.cli.recomputing import Recomputation
from dpo_dist.config import PackingConfig
from dpo_dist.engine import ActivationMemory
from dpo_dist.packing import input_tokens_of

# The measurement told that the step fits, and it did not: what is named is to take so much less of activations.
_LESS = 0.85


def more_room(prepared: Prepared, found: Recomputation, num_devices: int) -> str:
    """What a run that is out of memory could change; empty where nothing was measured.

    Args:
        prepared: the run.
        found: what `settle_recomputation` gave.
        num_devices: of the run.
    """
    longest = int(max(input_tokens_of(prepared.dataset, prepared.sharing[0])))
    stage = prepared.deepspeed.get("zero_optimization", {}).get("stage", 0)
    file = _sharding_more(prepared.config.parallel.deepspeed, stage, num_devices)
    return ways_out(found, longest, prepared.config.packing, file)


def ways_out(found: Recomputation, longest: int, packing: PackingConfig, file: str) -> str:
    """The settings, with values that would have fitted; empty where nothing was measured.

    Args:
        found: as above.
        longest: tokens of the longest example, which is never split.
        packing: as configured.
        file: for DeepSpeed, which takes less; empty: there is none.
    """
    memory = found.memory
    if memory is None:
        return ""
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


def _sharding_more(own: str, stage: int, num_devices: int) -> str:
    """A file of deepspeed_configs that takes less than a run's own; empty where there is none."""
    if num_devices > 1 and stage < 3:
        ending = next((ending for ending in ("_bf16", "_cpu") if own.endswith(ending)), "")
        return f"zero3{ending}"
    return "" if own.endswith(("_cpu", "_offload")) else "zero3_offload"
