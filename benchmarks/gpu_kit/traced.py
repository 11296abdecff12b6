"""`dpo-dist train` with one steady step under torch's profiler: torchrun ... -m benchmarks.gpu_kit.traced TRACE CONFIG

The step is the first one after the warm-up, from the end of the step before it to its own end. All ranks are profiled,
so that all are slowed down alike; the first one writes the trace.
"""

import sys
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.gpu_kit.kit import WARM_UP_STEPS
from benchmarks.gpu_kit.observed import save_nothing
from benchmarks.gpu_kit.profiling import STEP_NAME
from dpo_dist import trainer
from dpo_dist.cli import app
from dpo_dist.cli.ending import end_rank


class Tracer:
    """Wraps what the training loop calls at the end of each step."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.on_gpu = torch.cuda.is_available()
        devices = [ProfilerActivity.CUDA] if self.on_gpu else []
        self.profiler = profile(activities=[ProfilerActivity.CPU, *devices])
        self.step = record_function(STEP_NAME)
        self.finish_step = trainer._finish_step

    def __call__(self, run: trainer.Run, progress: trainer.Progress, *others: Any) -> None:
        """In place of `trainer._finish_step`."""
        self.finish_step(run, progress, *others)
        if progress.step == WARM_UP_STEPS:
            self._wait()
            self.profiler.start()
            self.step.__enter__()
        elif progress.step == WARM_UP_STEPS + 1:
            self._wait()
            self.step.__exit__(None, None, None)
            self.profiler.stop()
            if run.ranks.is_first:
                self.profiler.export_chrome_trace(self.path)

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


def main() -> int:
    """Run the command; its exit code."""
    path, config = sys.argv[1:]
    save_nothing()
    trainer._finish_step = Tracer(path)
    return app(args=["train", config], standalone_mode=False) or 0


if __name__ == "__main__":
    end_rank(main())
