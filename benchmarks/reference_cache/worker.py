"""One rank of a run whose parts are timed: `-m benchmarks.reference_cache.worker OUT.json CONFIG [OVERRIDE]...`."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from dpo_dist.cli import cache_dir, training
from dpo_dist.config import load_config
from dpo_dist.distributed import barrier, launched_rank
from dpo_dist.reference import ReferenceCache

seconds = {"fill": 0.0, "verify": 0.0, "train": 0.0}


def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The same, with its seconds added up; all ranks begin and end together."""

    def measured(*args: Any, **kwargs: Any) -> Any:
        barrier()
        started = time.perf_counter()
        result = function(*args, **kwargs)
        barrier()
        seconds[part] += time.perf_counter() - started
        return result

    return measured


def main() -> None:
    """Run as `dpo-dist train` does."""
    out, config, *overrides = sys.argv[1:]
    training.set_up_logging()
    with (
        mock.patch.object(training, "train", timed("train", training.train)),
        mock.patch.object(ReferenceCache, "fill", timed("fill", ReferenceCache.fill)),
        mock.patch.object(ReferenceCache, "verify", timed("verify", ReferenceCache.verify)),
    ):
        training.run_training(load_config(config, overrides), cache_dir())
    if launched_rank() == 0:
        Path(out).write_text(json.dumps(seconds) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # as dpo-dist's ranks end: DeepSpeed keeps threads alive that abort a process now and then
