"""What is compared: `ours` and `trl`, each with switches, by name.

`ours-packing-head` is ours with two switches off; `trl+head` is TRL with one on; `+compile` is either with torch's
compiler, `+sorted` either on examples in the order of their lengths.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

OFF = {
    "packing": "every example is a micro-batch of its own, for policy and reference",
    "sharing": "every completion carries its own copy of the prompt (model.prefix_sharing=off)",
    "head": "the output head is applied to every token, as TRL does on a CPU",
    "reference": "the reference is asked in every micro-batch (reference.per_microbatch=true)",
}
ON = {"head": "the output head is applied to completions only, as TRL does on a GPU (`_use_triton` replaced)"}
COMPILED = "compiled by torch ({})"
OPTIONS = {"ours": "model.torch_compile=true", "trl": "torch_compile=True"}
SORTED = "examples in the order of their lengths, the longest first"
DEFAULT = (
    *("ours", *(f"ours-{switch}" for switch in OFF)),
    *("trl", "trl+head", "trl+sorted", "trl+head+sorted"),
)
LEARNING_RATE, BETA, MAX_GRAD_NORM = 1e-5, 0.1, 1.0


@dataclass(frozen=True)
class Variant:
    """One of the things that are compared."""

    name: str
    side: str  # "ours" or "trl"
    switches: frozenset[str]  # of ours those that are off, of TRL those that are on
    order: str  # of the examples: "file" or "sorted"
    is_compiled: bool = False

    @classmethod
    def named(cls, name: str) -> "Variant":
        """The variant of a name.

        Raises:
            ValueError: there is no such variant.
        """
        side, sign = ("ours", "-") if name.startswith("ours") else ("trl", "+")
        rest, is_sorted = name.removesuffix("+sorted"), name.endswith("+sorted")
        rest, is_compiled = rest.removesuffix("+compile"), rest.endswith("+compile")
        first, *switches = rest.split(sign)
        known = OFF if side == "ours" else ON
        if first != side or not set(switches) <= known.keys():
            raise ValueError(
                f"{name} is no variant; there are ours, trl, with switches {', '.join(DEFAULT)}, and +compile before "
                "+sorted"
            )
        return cls(name, side, frozenset(switches), "sorted" if is_sorted else "file", is_compiled)

    @property
    def meaning(self) -> str:
        """In words."""
        known = OFF if self.side == "ours" else ON
        parts = [known[switch] for switch in sorted(self.switches)]
        parts += [COMPILED.format(OPTIONS[self.side])] if self.is_compiled else []
        parts += [SORTED] if self.order == "sorted" else []
        return "; ".join(parts) or ("all switches on" if self.side == "ours" else "stock")


def with_witnesses(names: list[str]) -> list[Variant]:
    """The variants of these names, and ours in every order that occurs: its losses are what others must have."""
    variants = [Variant.named(name) for name in dict.fromkeys(names)]
    needed = [witness_of(variant) for variant in variants]
    present = {variant.name for variant in variants}
    return variants + [Variant.named(name) for name in dict.fromkeys(needed) if name not in present]


def witness_of(variant: Variant) -> str:
    """The name of the variant whose losses it must have."""
    return "ours+sorted" if variant.order == "sorted" else "ours"


@dataclass(frozen=True)
class Task:
    """What all variants do alike."""

    model: str
    folder: Path  # with the files of `inputs.write_rows`
    steps: int  # warm-up included
    examples_per_step: int
    pairs_per_step: int
    threads: int
    max_tokens: int  # ours: of a micro-batch, where the longest example fits
    longest: tuple[int, int]  # tokens of the longest example: with its prompt once, and once for each completion
    deepspeed: str  # ours
    padding_of_data: float = 0.0  # `inputs.padding` of all the data that examples are drawn from

    def max_tokens_of(self, variant: Variant) -> int:
        """Ours: tokens of a micro-batch; an example is never split."""
        return max(self.max_tokens, self.longest["sharing" in variant.switches])


def our_config(task: Task, variant: Variant, recompute: bool | None, out: Path) -> dict[str, Any]:
    """The configuration of a run of ours."""
    return {
        "model": {
            "model_name_or_path": task.model,
            "dtype": "float32",
            "gradient_checkpointing": "auto" if recompute is None else recompute,
            "prefix_sharing": "off" if "sharing" in variant.switches else "on",
            "torch_compile": variant.is_compiled,
        },
        "data": {"train": [{"path": str(task.folder / f"ours-{variant.order}.jsonl")}]},
        "loss": {"loss_type": "sigmoid", "beta": BETA},
        "reference": {"source": "live", "per_microbatch": "reference" in variant.switches},
        "train": {
            "output_dir": str(out),
            "examples_per_step": task.examples_per_step,
            "max_steps": task.steps,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "max_grad_norm": MAX_GRAD_NORM,
            "shuffle": False,
        },
        "packing": {"max_tokens": task.max_tokens_of(variant)},
        "parallel": {"deepspeed": task.deepspeed},
        "log": {"report_to": []},
    }


def their_settings(task: Task, variant: Variant, recompute: bool | None, out: Path) -> dict[str, Any]:
    """What TRL is told; the rest is TRL's default, such as all pairs of a step in one micro-batch."""
    return {
        "model": task.model,
        "pairs": str(task.folder / f"trl-{variant.order}.jsonl"),
        "folder": str(out),
        "steps": task.steps,
        "pairs_per_step": task.pairs_per_step,
        "threads": task.threads,
        "gradient_checkpointing": recompute is not False,
        "completion_only_head": "head" in variant.switches,
        "torch_compile": variant.is_compiled,
        "learning_rate": LEARNING_RATE,
        "beta": BETA,
        "max_grad_norm": MAX_GRAD_NORM,
    }
