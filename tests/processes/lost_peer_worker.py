"""Loads shards while the other rank is killed or hangs: `torchrun -m tests.processes.lost_peer_worker FOLDER HOW`.

The first rank writes the class and the message of what it gets.
"""

import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dpo_dist.checkpoint.shards import load_shards
from dpo_dist.distributed import barrier, process_group, raise_together
from dpo_dist.errors import DataError
from tests.run_states import empty_shards


class Engine:
    """Gathers while it loads, as DeepSpeed's does."""

    checkpoint_engine: Any = None
    optimizer: Any = None

    def zero_optimization_stage(self) -> int:
        return 0

    def load_checkpoint(self, *arguments: object, **options: object) -> None:
        dist.all_reduce(torch.zeros(1))


def outcome(function: Any, *arguments: object) -> list[str]:
    try:
        function(*arguments)
    except Exception as error:
        return [type(error).__name__, str(error)]
    return []


def main(folder: Path, how: str) -> None:
    timeout = timedelta(seconds=3 if how == "hangs" else 60)
    with process_group(timeout) as ranks:
        if ranks.is_first:
            empty_shards(folder)
        barrier()
        if not ranks.is_first:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        seen = {
            "loading": outcome(load_shards, Engine(), folder),
            "own": outcome(raise_together, DataError("b.jsonl:9: bad")),
        }
        (folder / "seen.json").write_text(json.dumps(seen), encoding="utf-8")
        os._exit(1)  # nobody is left to leave with


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
