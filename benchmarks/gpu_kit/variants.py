"""The run of `throughput` with one thing changed at a time, as far as time and memory go: the part `variants`."""

from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

from benchmarks.gpu_kit.kit import Failed, Kit, Sizes, Skipped
from benchmarks.gpu_kit.throughput import config_of, model_of, trained, write_model, write_pairs

# Of policy and reference in bfloat16, gradients in float32, master weights and two moments.
STATE_BYTES = 2 + 2 + 4 + 12
# What a layer keeps of a token for backward, in numbers of its width and of its inner width: the inputs of two norms
# and their results, queries, keys, values, attention's output, residuals; of the inner width gate, up, and what is made
# of them. Written down from the layer's code, on the safe side.
KEPT_WIDTHS, KEPT_INNER_WIDTHS = 10, 4
COMPILING_SECONDS = 60.0  # more than another launch takes
USABLE = 0.85  # of a device's memory: the rest is gathered layers, chunks of logits, fragments


@dataclass(frozen=True)
class Variant:
    """One run.

    Attributes:
        name: as it is reported.
        sizes: of the model and of the pairs.
        seconds: that it must have left to be started.
        keeps: whether all activations are kept.
        has_own_model: whether its model is another one than that of `throughput`.
        changes: of the configuration, by section.
        package: that must be installed, on a machine with a GPU.
    """

    name: str
    sizes: Sizes
    seconds: float
    keeps: bool = False
    has_own_model: bool = False
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)
    package: str = ""


def variants_of(sizes: Sizes) -> list[Variant]:
    """The last one takes the place of the model, which no part needs after it."""
    short = replace(sizes, steps=sizes.variant_steps)
    # Twice the examples, so that a step still has more than one micro-batch.
    long = replace(short, max_tokens=4 * sizes.max_tokens, examples_per_rank=2 * sizes.examples_per_rank)
    usual, with_model = sizes.variant_seconds

    def with_option(name: str, option: str, value: bool, seconds: float = usual, package: str = "") -> Variant:
        return Variant(name, short, seconds, changes={"model": {option: value}}, package=package)

    return [
        replace(with_option("activations kept", "gradient_checkpointing", False), keeps=True),
        with_option("layers and head compiled", "torch_compile", True, usual + COMPILING_SECONDS),
        with_option("gradients in any order", "deterministic", False),
        with_option("Liger's kernels", "use_liger_kernel", True, package="liger_kernel"),
        Variant(f"{long.max_tokens} tokens at once", long, usual),
        Variant(
            f"{num_parameters(sizes.larger_model):,} parameters",
            replace(short, model=sizes.larger_model),
            with_model,
            has_own_model=True,
        ),
    ]


def variants(kit: Kit) -> dict[str, Any]:
    """A line for each; what was left out says why."""
    runs = []
    for number, variant in enumerate(variants_of(kit.sizes), 1):
        about = {"variant": variant.name, "max_tokens": variant.sizes.max_tokens}
        try:
            runs.append({**about, "status": "ok", **_measured(kit, variant, f"variant-{number}")})
        except Skipped as skipped:
            runs.append({**about, "status": "skipped", "reason": str(skipped)})
        except Failed as failed:
            # What memory takes is estimated: to run out of it is an answer.
            status = "skipped" if "out of memory" in str(failed) else "failed"
            runs.append({**about, "status": status, "reason": str(failed)})
    values = {"runs": runs}
    wrong = [f"{run['variant']}: {run['reason']}" for run in runs if run["status"] == "failed"]
    if wrong:
        raise Failed("; ".join(wrong), values)
    if all(run["status"] == "skipped" for run in runs):
        raise Skipped("; ".join(f"{run['variant']}: {run['reason']}" for run in runs))
    return values


def _measured(kit: Kit, variant: Variant, name: str) -> dict[str, Any]:
    """One run, if there is room and time."""
    needed, room = needed_bytes(variant, kit.num_ranks), room_for_each_rank(kit)
    if needed > USABLE * room:
        raise Skipped(f"a rank needs about {needed / 2**30:.0f} GiB, and has {room / 2**30:.0f}")
    if variant.package and not (kit.environment["gpus"] and find_spec(variant.package)):
        raise Skipped(f"needs a GPU, and the package {variant.package}")
    if kit.left < variant.seconds:
        raise Skipped(f"no time left: it takes about {variant.seconds:.0f} s, and there are {max(kit.left, 0):.0f}")
    own = replace(kit, sizes=variant.sizes)
    if variant.has_own_model or not model_of(kit).is_dir():
        write_model(own)
    write_pairs(own)
    config = config_of(own, "on")
    config["train"]["self_check"] = False
    for section, changes in variant.changes.items():
        config[section] |= changes
    return {"needed_bytes": needed, **trained(own, name, config)}


def needed_bytes(variant: Variant, num_ranks: int) -> float:
    """Of a rank, about: its part of ZeRO-3's states, and activations of a full micro-batch."""
    model, tokens = variant.sizes.model, variant.sizes.max_tokens
    width = model["hidden_size"]
    of_layer = 2 * (KEPT_WIDTHS * width + KEPT_INNER_WIDTHS * model["intermediate_size"])
    layers = model["num_hidden_layers"]
    of_token = layers * of_layer if variant.keeps else layers * 2 * width + of_layer
    return STATE_BYTES * num_parameters(model) / num_ranks + tokens * of_token


def num_parameters(model: dict[str, int]) -> int:
    """Of a Llama whose head is its embedding."""
    width, dim = model["hidden_size"], model["head_dim"]
    attention = 2 * width * dim * (model["num_attention_heads"] + model["num_key_value_heads"])
    layer = attention + 3 * width * model["intermediate_size"] + 2 * width
    return model["vocab_size"] * width + model["num_hidden_layers"] * layer + width


def room_for_each_rank(kit: Kit) -> float:
    """Bytes of the smallest GPU; without one, of the machine, which ranks share."""
    gpus = kit.environment["gpus"]
    if gpus:
        return min(gpu["memory_gib"] for gpu in gpus) * 2**30
    return kit.environment["cpu"]["memory_gib"] * 2**30 / kit.num_ranks
