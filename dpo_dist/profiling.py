"""Single steps under torch's profiler, as traces that chrome://tracing and Perfetto read."""

import logging
from collections.abc import Sequence
from pathlib import Path

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

    def begin(self, place: Place) -> None:
        """A phase begins: perhaps a step that is to be recorded."""
        if place.phase == "step" and place.step in self.steps:
            self._running = profile(activities=self._activities)
            self._running.start()

    def end(self, place: Place) -> None:
        """A phase begins: perhaps the one after a recorded step, whose trace is written. A full disk ends no run."""
        if place.phase != "numbers" or (running := self.stop()) is None:
            return
        path = self.folder / f"step-{place.step:06d}.json.gz"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            running.export_chrome_trace(str(path))
        except OSError as error:
            logger.warning("the trace of step %d is not written: %s", place.step, error)
        else:
            logger.info("trace of step %d written to %s", place.step, path)

    def stop(self) -> profile | None:
        """End the recording that is going on, and return it; also where its step does not come to an end."""
        running, self._running = self._running, None
        if running is not None:
            running.stop()
        return running
