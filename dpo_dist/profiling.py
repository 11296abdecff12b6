"""Single steps under torch's profiler, as traces that chrome://tracing and Perfetto read."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from dpo_dist.phases import Place

logger = logging.getLogger(__name__)


class StepProfiler:
    """Listens to phases, and records the steps that were asked for, from their beginning until their numbers are known.

    Args:
        folder: where traces are written, a file for each step; made if it is needed.
        steps: updates, counted from 1.
        device: whose work is recorded besides the host's.
    """

    def __init__(self, folder: Path, steps: Sequence[int], device: torch.device) -> None:
        self.folder, self.steps = folder, frozenset(steps)
        self._activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        self._running: profile | None = None

    def __call__(self, place: Place) -> None:
        """A phase begins."""
        if place.phase == "step" and place.step in self.steps:
            self._running = profile(activities=self._activities)
            self._running.start()
        elif place.phase == "numbers" and self._running is not None:
            running, self._running = self._running, None
            running.stop()
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"step-{place.step:06d}.json.gz"
            running.export_chrome_trace(str(path))
            logger.info("trace of step %d written to %s", place.step, path)
