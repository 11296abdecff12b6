"""How fast a run is, what its time goes to, and how much of the device's speed that is."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dpo_dist.packing import CostModel, ExampleSize
from dpo_dist.phases import Place

# What a phase of `phases.py` counts as. A step begins with `step` and is over with `numbers`.
PARTS = {
    "step": "data",
    "reference": "reference",
    "forward": "forward",
    "backward": "backward",
    "update": "update",
    "agree": "agree",
}
TIMES = tuple(f"time/{part}" for part in PARTS.values())

# Floating-point operations per second of dense matrix products in bfloat16 and float16, without sparsity, from NVIDIA's
# and AMD's data sheets; the longest name that the device's own begins with or holds counts.
_PEAKS = {
    "B200": 2.25e15,
    "GB200": 2.5e15,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "RTX 4090": 165e12,
    "MI300X": 1307e12,
}
_MEASURED_SECONDS = 0.2
_SIDE = 1024  # of the square matrices that are multiplied where no data sheet is known


@dataclass
class Stopwatch:
    """Seconds between one phase and the next, as the device spends them.

    On a GPU the host runs ahead: events of the device's own clock are set where phases begin, and read when it is
    waited for anyway.
    """

    device: torch.device
    _marks: list[tuple[str, Any]] = field(default_factory=list)
    _is_step: bool = False  # evaluation has phases of the same names

    def __call__(self, place: Place) -> None:
        """A phase begins."""
        self._is_step = self._is_step or place.phase == "step"
        if self._is_step:
            self._marks.append((place.phase, self._now()))
        self._is_step = self._is_step and place.phase != "numbers"

    def read(self) -> dict[str, float]:
        """Seconds of each part of `PARTS` since the last call. The device must have done what it was given.

        The phase that is going on is left for the next call.
        """
        spent: dict[str, float] = dict.fromkeys(PARTS.values(), 0.0)
        for (phase, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            if phase in PARTS:
                spent[PARTS[phase]] += self._between(begin, end)
        self._marks = self._marks[-1:]
        return spent

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) / 1e3 if self.device.type == "cuda" else end - begin


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a matrix product on one device: of its data sheet, or measured (0.2 s)."""
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(device)
        known = [one for one in _PEAKS if one in name]
        if known:
            return _PEAKS[max(known, key=len)]
    left, right = (torch.rand(_SIDE, _SIDE, device=device).to(dtype) for _ in range(2))
    out, fastest, until = left @ right, float("inf"), time.perf_counter() + _MEASURED_SECONDS
    while time.perf_counter() < until:
        started = time.perf_counter()
        torch.mm(left, right, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        fastest = min(fastest, time.perf_counter() - started)
    return 2.0 * _SIDE**3 / fastest


@dataclass(frozen=True)
class Advice:
    """What a run could change; the first thing that applies is told.

    Attributes:
        recomputed: layers that compute their activations again, and all.
        passes: how often the reference is asked for the same example; 0: nothing is computed for it in a step.
        stage: of ZeRO.
        num_devices: of the run.
    """

    recomputed: tuple[int, int]
    passes: float
    stage: int
    num_devices: int

    def of(self, shares: dict[str, float]) -> str:
        """One sentence."""
        if shares["data"] > 0.1:
            return "Micro-batches are waited for: give each rank another CPU core"
        if shares["agree"] > 0.15 and self.num_devices > 1:
            return "Ranks wait for each other: raise train.examples_per_step, over which uneven examples even out"
        if shares["reference"] > 0.15 and self.passes > 1:
            return "The reference is computed for the same examples again: reference.source=cache does it once"
        if shares["update"] > 0.2:
            return "Updates are dear: a larger train.examples_per_step has fewer of them"
        if self.recomputed[0] > 0:
            layers = f"{self.recomputed[0]} of {self.recomputed[1]} layers"
            return f"Activations are recomputed in {layers}: a smaller packing.max_tokens lets more be kept"
        if self.stage == 3 and self.num_devices > 1:
            return "Weights are gathered for every micro-batch: a larger packing.max_tokens makes fewer of them"
        return "Nothing waits: it is the model's own products"


@dataclass
class Pace:
    """What a run has done since its last line, and since it began.

    Args:
        stopwatch: listens to phases.
        peak: of one device, operations per second.
        num_devices: of the run.
        advice: what there is to be changed.
    """

    stopwatch: Stopwatch
    peak: float
    num_devices: int
    advice: Advice
    _flops: float = 0.0  # since the last line
    _spent: dict[str, float] = field(default_factory=dict)  # since the beginning, seconds
    _all_flops: float = 0.0
    _seconds: float = 0.0

    def add(self, cost: CostModel, sizes: Sequence[ExampleSize]) -> None:
        """A step is made, of these examples on all ranks."""
        self._flops += cost.useful(sizes, passes=1.0 if self.advice.passes else 0.0)

    def line(self, seconds: float, steps: int) -> dict[str, float]:
        """For a line of metrics: seconds of each part of a step, and the share of the devices' peak.

        Args:
            seconds: of the steps since the last call, without what is no training.
            steps: how many.
        """
        spent, flops, self._flops = self.stopwatch.read(), self._flops, 0.0
        self._spent = {part: self._spent.get(part, 0.0) + value for part, value in spent.items()}
        self._all_flops += flops
        self._seconds += seconds
        return {
            "mfu": flops / (seconds * self.peak * self.num_devices),
            **{f"time/{part}": spent[part] / steps for part in PARTS.values()},
        }

    def verdict(self) -> str:
        """What the time went to, and what to change: one line, at the end; empty where no step was made."""
        total = sum(self._spent.values())
        if not total:
            return ""
        shares = {part: self._spent[part] / total for part in PARTS.values()}
        told = ", ".join(f"{part} {share:.0%}" for part, share in sorted(shares.items(), key=lambda one: -one[1]))
        mfu = self._all_flops / (self._seconds * self.peak * self.num_devices)
        return f"time of a step: {told}; {mfu:.0%} of the devices' matrix products (mfu). {self.advice.of(shares)}"
