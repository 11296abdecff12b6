"""Single steps under torch's profiler, as traces that chrome://tracing and Perfetto read, and how long ranks talked."""

import gzip
import json
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from dpo_dist.phases import Place

logger = logging.getLogger(__name__)


class StepProfiler:
    """Records the steps that were asked for, from their beginning until their numbers are known.

    `begin` and `end` listen to phases (`phases.listening`). Who measures the step's time listens between them: starting
    and ending a profiler takes longer than many a step.

    Args:
        folder: where traces are written, a file for each step; made if it is needed.
        steps: updates, counted from 1.
        device: whose work is recorded besides the host's.
    """

    def __init__(self, folder: Path, steps: Sequence[int], device: torch.device) -> None:
        self.folder, self.steps = folder, frozenset(steps)
        self._activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        self._running: profile | None = None
        self._since = 0.0

    def begin(self, place: Place) -> None:
        """A phase begins: perhaps a step that is to be recorded."""
        if place.phase == "step" and place.step in self.steps:
            self._running = profile(activities=self._activities)
            self._running.start()
            self._since = time.perf_counter()

    def end(self, place: Place) -> None:
        """A phase begins: perhaps the one after a recorded step, whose trace is written. A full disk ends no run."""
        if place.phase != "numbers" or self._running is None:
            return
        seconds = time.perf_counter() - self._since
        running = self.stop()
        assert running is not None
        path = self.folder / f"step-{place.step:06d}.json.gz"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            running.export_chrome_trace(str(path))
        except OSError as error:
            logger.warning("the trace of step %d is not written: %s", place.step, error)
        else:
            logger.info("trace of step %d written to %s%s", place.step, path, _told(path, seconds))

    def stop(self) -> profile | None:
        """End the recording that is going on, and return it; also where its step does not come to an end."""
        running, self._running = self._running, None
        if running is not None:
            running.stop()
        return running


@dataclass(frozen=True)
class Communication:
    """Collectives of one rank, waiting for other ranks in them included; overlapping ones count once."""

    seconds: float
    exposed: float
    """Of these, those in which the rank computed nothing."""

    def told(self, step: float) -> str:
        """As the end of a line, for a step of so many seconds; empty where there was none."""
        if not self.seconds:
            return ""
        return (
            f": of its {step:.3g} s collectives took {self.seconds:.3g} ({self.seconds / step:.0%}), "
            f"{self.exposed:.3g} of them ({self.exposed / step:.0%}) while nothing was computed"
        )


def _told(path: Path, seconds: float) -> str:
    # Read again: torch's own list of what it recorded takes fifteen times as long to make.
    try:
        return communication_in(json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]).told(seconds)
    except (OSError, ValueError, LookupError) as error:  # names of operations may hold what is no JSON
        return f" (what it says of communication cannot be read: {error})"


def communication_in(events: Iterable[dict[str, Any]]) -> Communication:
    """What a trace says of it: on a GPU of its kernels, elsewhere of gloo's threads and the host's operations.

    Args:
        events: of a Chrome trace as torch's profiler writes it, times in microseconds.
    """
    timed = [event for event in events if event.get("ph") == "X"]
    kernels = [event for event in timed if event.get("cat") == "kernel"]
    if kernels:
        collectives = [kernel for kernel in kernels if kernel["name"].startswith("nccl")]
        computed = [kernel for kernel in kernels if not kernel["name"].startswith("nccl")]
    else:
        collectives = [event for event in timed if event["name"].startswith("gloo:")]
        computed = [event for event in timed if event["name"].startswith("aten::")]
    talking, either = covered(collectives), covered(collectives + computed)
    return Communication(talking / 1e6, (either - covered(computed)) / 1e6)


def covered(events: Iterable[dict[str, Any]]) -> float:
    """Microseconds in which at least one of them runs."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted((event["ts"], event["ts"] + event["dur"]) for event in events):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total
