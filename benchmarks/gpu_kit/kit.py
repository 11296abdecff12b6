"""What the parts share: where they write, how large they are, how long they may take, how they start ranks."""

import json
import math
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.launching import REPOSITORY, launch

LIMIT_SECONDS = 600.0
# Of each part; what a part does not need is left to those after it. What is measured of a step comes after what is
# checked, then comes what needs another package, and last what runs only where time is left.
BUDGETS = {
    "environment": 60.0,
    "golden": 160.0,
    "ceilings": 20.0,
    "kernels": 40.0,
    "throughput": 130.0,
    "memory": 5.0,
    "self_check": 5.0,
    "bandwidth": 30.0,
    "profile": 40.0,
    "trl": 80.0,
    "variants": 30.0,
}
# Less than this is not worth a start: torch and DeepSpeed are imported on every rank.
SHORTEST_LAUNCH_SECONDS = 15.0
TRAIN = ("dpo_dist", "train")
OBSERVED = ("benchmarks.gpu_kit.observed",)  # the same, saves nothing, and says what it held
WARM_UP_STEPS = 2  # allocator, kernels and ZeRO-3's trace of the layers


class Skipped(Exception):  # noqa: N818
    """A part that cannot be measured here, with the reason."""


class Failed(Exception):  # noqa: N818
    """A part that was measured and is not as it must be."""

    def __init__(self, reason: str, values: dict[str, Any] | None = None) -> None:
        super().__init__(reason)
        self.values = values or {}


@dataclass(frozen=True)
class Sizes:
    """How much is computed; with the number of ranks the only thing that differs between machines."""

    name: str
    why: str
    cases: tuple[str, ...]  # recorded runs that are repeated in float32; the first one in bfloat16 as well
    model: dict[str, int]  # of a Llama
    prompt: tuple[int, int]  # tokens: median and longest
    completion: tuple[int, int]
    examples_per_rank: int  # of a step
    max_tokens: int
    steps: int
    messages: tuple[int, ...]  # bytes on each rank
    trl_pairs: tuple[int, ...]  # of a micro-batch of TRL, which pads: the fastest counts
    larger_model: dict[str, int]  # of the part `variants`, as the next two
    variant_steps: int
    variant_seconds: tuple[float, float]  # a launch with the model, and one with the larger model and its making
    product_side: int  # of the matrices whose product is a ceiling
    copy_bytes: int
    kernel_heads: tuple[tuple[int, int, int], ...]  # query heads, key heads, size
    window: int  # tokens, where kernels are compared with one


def _llama(
    vocabulary: int, width: int, inner: int, layers: int, heads: int, kv_heads: int, head_dim: int
) -> dict[str, int]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
    }


TINY = Sizes(
    name="tiny",
    why="there is no GPU: the numbers say that the kit works, nothing about speed",
    cases=("sigmoid",),
    model=_llama(512, 64, 160, 2, 4, 2, 16),
    prompt=(40, 128),
    completion=(20, 64),
    examples_per_rank=4,
    max_tokens=512,
    steps=5,
    messages=(2**14, 2**18),
    trl_pairs=(2,),
    larger_model=_llama(512, 96, 256, 3, 4, 2, 24),
    variant_steps=4,
    variant_seconds=(15.0, 25.0),
    product_side=256,
    copy_bytes=2**22,
    kernel_heads=((4, 2, 64), (4, 2, 128)),
    window=16,
)
SMALL = Sizes(
    name="small",
    why="the smallest GPU has less than 38 GiB",
    cases=("sigmoid", "sigmoid_beta_0.5", "sigmoid_ga1", "sigmoid_ga2", "sigmoid_ga4"),
    model=_llama(32768, 1024, 2816, 12, 16, 8, 64),
    prompt=(200, 2048),
    completion=(220, 1024),
    examples_per_rank=32,
    max_tokens=8192,
    steps=10,
    messages=tuple(2**k for k in range(16, 29, 2)),
    trl_pairs=(4, 2),  # 4 are about as many tokens with their padding as `max_tokens`; 2 need less padding
    larger_model=_llama(128256, 3072, 8192, 28, 24, 8, 128),  # the shape of Llama 3.2 3B
    variant_steps=6,
    variant_seconds=(40.0, 75.0),
    product_side=8192,
    copy_bytes=2**31,
    kernel_heads=((32, 8, 64), (32, 8, 128)),
    window=128,
)
LARGE = Sizes(
    name="large",
    why="the smallest GPU has 38 GiB or more; the model has the shape of Llama 3.2 1B",
    cases=SMALL.cases,
    model=_llama(128256, 2048, 8192, 16, 32, 8, 64),
    prompt=SMALL.prompt,
    completion=SMALL.completion,
    examples_per_rank=32,
    max_tokens=8192,
    steps=10,
    messages=tuple(2**k for k in range(16, 31, 2)),
    trl_pairs=SMALL.trl_pairs,
    larger_model=SMALL.larger_model,
    variant_steps=SMALL.variant_steps,
    variant_seconds=SMALL.variant_seconds,
    product_side=SMALL.product_side,
    copy_bytes=SMALL.copy_bytes,
    kernel_heads=SMALL.kernel_heads,
    window=SMALL.window,
)


def sizes_for(gpus: list[dict[str, Any]]) -> Sizes:
    """What a machine can do in the time there is."""
    if not gpus:
        return TINY
    return LARGE if min(gpu["memory_gib"] for gpu in gpus) >= 38 else SMALL


@dataclass
class Kit:
    """One run of the kit."""

    out: Path
    num_ranks: int
    sizes: Sizes
    environment: dict[str, Any]
    plant: str | None
    started: float = field(default_factory=time.monotonic)
    ends_after: float = LIMIT_SECONDS  # seconds since the start: the part that runs is to be done by then
    ceilings: dict[str, Any] = field(default_factory=dict)  # of the part of that name; empty before it and without it

    def begin(self, part: str) -> None:
        """Give a part its time: its own, and what those before it have left."""
        names = list(BUDGETS)
        self.ends_after = sum(BUDGETS[name] for name in names[: names.index(part) + 1])

    @property
    def left(self) -> float:
        """Seconds that the part which runs may still take."""
        return self.ends_after - (time.monotonic() - self.started)

    @property
    def work(self) -> Path:
        """Configurations, models and runs; removed at the end."""
        return self.out / "work"

    def log_of(self, name: str) -> Path:
        """What a launch printed."""
        return self.out / "logs" / f"{name}.txt"

    def run(self, num_ranks: int, name: str, module: str, *arguments: str, limit: float) -> None:
        """Run a module on ranks to its end; what it printed is kept in `logs/<name>.txt`.

        Raises:
            Skipped: there is no time left.
            Failed: it did not end with 0, or not in time.
        """
        left = self.left
        if left < SHORTEST_LAUNCH_SECONDS:
            raise Skipped(f"no time left: this part ends {self.ends_after:.0f} s after the start")
        cache = {"DPO_DIST_CACHE": str(self.work / "cache")}
        try:
            done = launch(num_ranks, module, *arguments, cwd=REPOSITORY, env=cache, timeout=min(limit, left))
        except subprocess.TimeoutExpired as expired:
            self.log_of(name).write_text(f"{expired.stdout}\n{expired.stderr}", encoding="utf-8")
            raise Failed(f"{name} was not done after {expired.timeout:.0f} s") from None
        self.log_of(name).write_text(f"{done.stdout}\n{done.stderr}", encoding="utf-8")
        if done.returncode != 0:
            raise Failed(f"{name} ended with exit code {done.returncode}: {cause_in(done.stderr)}")

    def train(self, name: str, config: dict[str, Any], *, by: tuple[str, ...] = TRAIN, limit: float) -> Path:
        """`dpo-dist train` on all ranks; returns the run's folder.

        Args:
            name: of the run's files.
            config: of the run; its `train.output_dir` is set here.
            by: the module that trains, and what it gets before the configuration; else the plain command.
            limit: seconds.
        """
        folder = self.work / name
        config["train"]["output_dir"] = str(folder)
        path = self.work / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        module, *before = by
        self.run(self.num_ranks, name, module, *before, str(path), limit=limit)
        return folder

    def observations(self, folder: Path) -> list[dict[str, Any]]:
        """What `observed` wrote, by rank."""
        return [json.loads((folder / f"observed-{rank}.json").read_text()) for rank in range(self.num_ranks)]


def largest(values: Iterable[float]) -> float:
    """The largest of some distances; NaN if there is one, which max() may pass over."""
    return max(values, key=lambda value: (math.isnan(value), value))


def cause_in(printed: str) -> str:
    """The line of a launch's output that says most: the first of an error, else the last one."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    signs = ("Error: ", "CUDA error", "terminate called")
    telling = [line for line in lines if line.startswith("error:") or any(sign in line for sign in signs)]
    return (telling or lines[-1:] or ["nothing was printed"])[0]
