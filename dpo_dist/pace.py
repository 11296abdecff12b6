"""How fast a run is, what its time goes to, and how much of the devices' speed that is."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from dpo_dist.packing import CostModel, ExampleSize, StepPlan
from dpo_dist.phases import Place

# What a phase of `phases.py` counts as. A step begins with `step` and is over with `numbers`.
PARTS = {
    "step": "data",
    "data": "data",
    "reference": "reference",
    "forward": "forward",
    "backward": "backward",
    "update": "update",
    "agree": "agree",
}
PART_NAMES = tuple(dict.fromkeys(PARTS.values()))
TIMES = tuple(f"time/{part}" for part in PART_NAMES)

# Operations per second of dense matrix products in bfloat16 and float16, from data sheets; half of the number where one
# gives it with sparsity. NVIDIA's: "GB200 NVL72" (of two GPUs), "HGX B200" (of eight), "GH200", "H200", "H100", "H20",
# "A100", "A800", "L40S", "L40", "L4". AMD's: "Instinct MI300X". A device has the longest name that stands in its own.
_PEAKS = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "GH200": 990e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "MI300X": 1307e12,
}
_MEASURED_SECONDS = 0.1
_SIDES = {"cpu": 512, "cuda": 4096}  # of the square matrices that are multiplied where no data sheet is known


@dataclass
class Stopwatch:
    """Seconds from one phase to the next, as the device spends them. It listens to phases (`phases.listening`).

    On a GPU the host runs ahead. Events of the device's own clock are set where phases begin, and read at the end of a
    step, when the step's numbers have come and the device has nothing left to do. So host work that the device does not
    wait for takes no time. Evaluation and saving have phases of the same names; outside of steps none counts.
    """

    device: torch.device
    _marks: list[tuple[str, Any]] = field(default_factory=list)
    _spent: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PART_NAMES, 0.0))

    def __call__(self, place: Place) -> None:
        """A phase begins."""
        if place.phase == "step":
            self._marks.clear()
        if place.phase == "step" or self._marks:
            self._marks.append((place.phase, self._now()))
        if place.phase == "numbers" and self._marks:
            self._add_up()

    def read(self) -> dict[str, float]:
        """Seconds of each of `PART_NAMES` in the steps that have ended since the last call."""
        spent, self._spent = self._spent, dict.fromkeys(PART_NAMES, 0.0)
        return spent

    def _add_up(self) -> None:
        marks, self._marks = self._marks, []
        if self.device.type == "cuda":
            marks[-1][1].synchronize()  # it was only just set
        for (phase, begin), (_, end) in pairwise(marks):
            if phase in PARTS:  # completing a checkpoint between phases of a step is no part of it
                self._spent[PARTS[phase]] += self._between(begin, end)

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) / 1e3 if self.device.type == "cuda" else end - begin


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a matrix product on one device: of its data sheet, or measured (0.1 s).

    What is measured is less than a data sheet promises, and `mfu` then larger. No random generator of the run is used.
    """
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(device)
        known = [one for one in _PEAKS if re.search(rf"(?<!\w){one}(?!\w)", name)]
        if known:
            return _PEAKS[max(known, key=len)]
    side, generator = _SIDES[device.type], torch.Generator(device).manual_seed(0)
    left, right = (torch.rand(side, side, device=device, generator=generator).to(dtype) for _ in range(2))
    out, fastest = left @ right, float("inf")
    _wait_for(device)
    until = time.perf_counter() + _MEASURED_SECONDS
    while time.perf_counter() < until:
        started = time.perf_counter()
        torch.mm(left, right, out=out)
        _wait_for(device)
        fastest = min(fastest, time.perf_counter() - started)
    return 2.0 * side**3 / fastest


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Advice:
    """What a run could change; the first thing that applies is told.

    Attributes:
        recomputed: layers that compute their activations again, and all.
        is_chosen: whether the configuration says so, and not the memory that was there.
        passes: how often a reference that could be cached is computed for the same example; 0: in no step.
        stage: of ZeRO.
        num_devices: of the run.
    """

    recomputed: tuple[int, int]
    is_chosen: bool
    passes: float
    stage: int
    num_devices: int

    def of(self, shares: dict[str, float], idle: float, slots: float) -> str:
        """One sentence.

        Args:
            shares: of a step's time, by `PART_NAMES`.
            idle: share of the ranks' time in which they wait for each other, by the plans of the steps.
            slots: micro-batches of a rank in a step.
        """
        layers = f"{self.recomputed[0]} of {self.recomputed[1]} layers"
        rules = [
            (
                shares["data"] > 0.1,
                "The device waits for micro-batches: give each rank more CPU cores (--cpus-per-task under Slurm)",
            ),
            (
                idle > 0.1,
                f"Ranks wait for each other's examples, {idle:.0%} of their time: over a larger "
                "train.examples_per_step uneven ones even out",
            ),
            (
                shares["reference"] > 0.15 and self.passes > 1,
                "The reference is computed for the same examples again: reference.source=cache does it once",
            ),
            (shares["update"] > 0.2, "Updates are dear: a larger train.examples_per_step makes fewer of them"),
            (
                self.recomputed[0] > 0 and self.is_chosen,
                f"Activations are recomputed in {layers}: model.gradient_checkpointing=auto keeps what there is room "
                "for",
            ),
            (
                self.recomputed[0] > 0,
                f"Activations are recomputed in {layers}: a smaller packing.max_tokens lets more be kept",
            ),
            (
                self.stage == 3 and self.num_devices > 1 and slots > 1.5,
                f"Weights are gathered for each of {slots:.2g} micro-batches: a larger packing.max_tokens makes fewer",
            ),
            (
                self.stage == 3 and self.num_devices > 1,
                "Weights are gathered for a single micro-batch: a larger train.examples_per_step makes more of it, and "
                "a lower ZeRO stage, where its memory is there, gathers less",
            ),
        ]
        return next((text for applies, text in rules if applies), "Nothing waits: it is the model's own products")


@dataclass
class Pace:
    """What a run has done since its last line, and since this process began.

    A resumed run may finish an interval that another process began: only what this one has done is counted here.

    Args:
        stopwatch: listens to phases.
        peak: of one device, operations per second; at least what its steps have done.
        num_devices: of the run: ranks.
        cost: of the policy.
        reference_cost: of a reference that is computed in the step; None: there is none.
        advice: what there is to be changed.
    """

    stopwatch: Stopwatch
    peak: float
    num_devices: int
    cost: CostModel
    reference_cost: CostModel | None
    advice: Advice
    _steps: int = 0  # since the last line, as the next three
    _pairs: int = 0
    _tokens: int = 0
    _flops: float = 0.0
    _spent: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PART_NAMES, 0.0))  # in all, seconds
    _all_flops: float = 0.0
    _all_steps: int = 0
    _all_slots: int = 0
    _all_idle: float = 0.0

    def add(self, plan: StepPlan, sizes: Sequence[ExampleSize], pairs: int, tokens: int) -> None:
        """A step is made, also one whose update was refused.

        Args:
            plan: of the step.
            sizes: of its examples, on all ranks.
            pairs: of them.
            tokens: that the policy has processed.
        """
        flops = self.cost.useful(sizes)
        if self.reference_cost is not None:
            flops += float(self.reference_cost.forward(sizes, share_prompt=True).sum())
        self._steps, self._pairs, self._tokens = self._steps + 1, self._pairs + pairs, self._tokens + tokens
        self._flops += flops
        self._all_flops += flops
        self._all_steps, self._all_slots = self._all_steps + 1, self._all_slots + len(plan.micro_batches[0])
        self._all_idle += plan.idle

    def line(self, seconds: float) -> dict[str, float]:
        """For a line of metrics: rates over all devices, seconds of a step and of its parts, share of the peak.

        Args:
            seconds: of the steps since the last call, of which there is one at least; without evaluation and saving.
        """
        spent, steps = self._read(), self._steps
        pairs, tokens, flops = self._pairs, self._tokens, self._flops
        self._steps, self._pairs, self._tokens, self._flops = 0, 0, 0, 0.0
        # What was measured while the machine did other work is less than the peak: steps that do more than it show so.
        self.peak = max(self.peak, flops / (seconds * self.num_devices))
        return {
            **({"pairs_per_second": pairs / seconds} if pairs else {}),
            "tokens_per_second": tokens / seconds,
            "time/step": seconds / steps,
            **{f"time/{part}": spent[part] / steps for part in PART_NAMES},
            "mfu": flops / (seconds * self.peak * self.num_devices),
        }

    def verdict(self) -> str:
        """What the time of all steps went to, and what to change: one line, at the end; empty where none was made."""
        self._read()
        total = sum(self._spent.values())
        if not total:
            return ""
        shares = {part: value / total for part, value in self._spent.items()}
        most = sorted(((share, part) for part, share in shares.items() if share), reverse=True)
        told = ", ".join(f"{part} {share:.0%}" for share, part in most)
        mfu, steps = self._all_flops / (total * self.peak * self.num_devices), max(self._all_steps, 1)
        advice = self.advice.of(shares, self._all_idle / steps, self._all_slots / steps)
        return f"time of a step: {told}; mfu {mfu:.0%}. {advice}"

    def _read(self) -> dict[str, float]:
        spent = self.stopwatch.read()
        for part, value in spent.items():
            self._spent[part] += value
        return spent
