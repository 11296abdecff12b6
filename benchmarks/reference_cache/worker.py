"""One rank of a run whose parts are timed: `-m benchmarks.reference_cache.worker OUT.json TURNS CONFIG [OVERRIDE]...`.

Before every step the first rank writes a line to the pipe TURNS.asks and waits for one from TURNS.may, so that several
runs take their steps in turn and none is timed while another computes.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO
from unittest import mock

from dpo_dist import trainer
from dpo_dist.cli import cache_dir, training
from dpo_dist.cli.logs import set_up_logging
from dpo_dist.config import load_config
from dpo_dist.distributed import barrier, launched_rank
from dpo_dist.reference import ReferenceCache

ASKS, MAY = ".asks", ".may"
seconds = {"fill": 0.0, "verify": 0.0, "train": 0.0, "save": 0.0}  # training without saving


def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The same, with its seconds added up; all ranks begin and end together."""

    def measured(*args: Any, **kwargs: Any) -> Any:
        barrier()
        started = time.perf_counter()
        result = function(*args, **kwargs)
        barrier()
        seconds[part] += (taken := time.perf_counter() - started)
        if part == "save":
            seconds["train"] -= taken
        return result

    return measured


def wait_for_turn(asks: TextIO | None, may: TextIO | None) -> None:
    """Return when this run may take a step; what passes meanwhile is not its training."""
    barrier()
    asked = time.perf_counter()
    if asks and may:
        print("step", file=asks, flush=True)
        may.readline()
    barrier()
    seconds["train"] -= time.perf_counter() - asked


def main() -> None:
    """Run as `dpo-dist train` does."""
    out, turns, config, *overrides = sys.argv[1:]
    is_first = launched_rank() == 0
    plan = trainer.Run.plan

    def train_in_turn(run: trainer.Run, progress: trainer.Progress) -> None:
        def plan_in_turn(run: trainer.Run, step: int) -> Any:  # the first thing of every step
            wait_for_turn(asks, may)
            return plan(run, step)

        with mock.patch.object(trainer.Run, "plan", plan_in_turn):
            trainer.train(run, progress)

    set_up_logging()
    with (
        ExitStack() as stack,
        mock.patch.object(training, "train", timed("train", train_in_turn)),
        mock.patch.object(trainer, "save", timed("save", trainer.save)),
        mock.patch.object(ReferenceCache, "fill", timed("fill", ReferenceCache.fill)),
        mock.patch.object(ReferenceCache, "verify", timed("verify", ReferenceCache.verify)),
    ):
        asks = stack.enter_context(Path(turns + ASKS).open("w", encoding="utf-8")) if is_first else None
        may = stack.enter_context(Path(turns + MAY).open(encoding="utf-8")) if is_first else None
        training.run_training(load_config(config, overrides), cache_dir())
    if is_first:
        Path(out).write_text(json.dumps(seconds) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # as dpo-dist's ranks end: DeepSpeed keeps threads alive that abort a process now and then
