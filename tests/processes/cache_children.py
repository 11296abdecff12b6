"""Processes that fill a cache and are killed: `-m tests.processes.cache_children`.

Every line of standard input is a JSON pair: a folder, and a list of children that run at the same time. Each is forked
from this process, which has imported everything. A line of output, after `ended `, says how each did. A child appends
every row it has computed to FOLDER/computed.jsonl, and `null` when `fill` says that all before is durable.

    name     its log is FOLDER/NAME.log
    pause_s  slept before each micro-batch
    behind   computes nothing before the log of the child of this name says that it waits
    kill_s   seconds from its first computed row on after which it is killed; when the killer is late, it waits for it
    write    [number, bytes]: it kills itself in its write of this number, after so many bytes; -1: before the fsync
"""

import json
import logging
import math
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpo_dist.batch import MicroBatch
from dpo_dist.distributed import Ranks
from dpo_dist.packing import Packer
from dpo_dist.reference import CacheIdentity, open_cache, store
from dpo_dist.tokenization import TokenizedDataset
from tests.stored_rows import KnownScorer

IDENTITY = CacheIdentity("weights", "float32", "1-sdpa")


class LoggingScorer(KnownScorer):
    """Tells a file of every row before its value is used."""

    def __init__(self, folder: Path, pause_s: float, kill_s: float = math.inf, behind: Path | None = None) -> None:
        super().__init__()
        self._behind = behind
        self._kill_s, self._first_at = kill_s, math.inf
        self._log = (folder / "computed.jsonl").open("a", buffering=1, encoding="utf-8")
        self._pause_s = pause_s

    def token_logps(self, batch: MicroBatch) -> Tensor:
        time.sleep(self._pause_s)
        self._wait_for_another()
        if time.monotonic() - self._first_at > self._kill_s + 0.01:
            time.sleep(60)
        begin, values = len(self.seen), super().token_logps(batch)
        self._log.write("".join(json.dumps(row) + "\n" for row in self.seen[begin:]))
        self._first_at = min(self._first_at, time.monotonic())
        return values

    def _wait_for_another(self) -> None:
        """Until it says that it waits; if it ends instead, the test says so."""
        end = time.monotonic() + 60
        while self._behind and time.monotonic() < end:
            if self._behind.exists() and "which computes rows" in self._behind.read_text():
                self._behind = None
            time.sleep(0.01)

    def all_durable(self, done: int, total: int) -> None:
        """The progress function of `fill`."""
        self._log.write("null\n")


class DyingWriter(store.PartWriter):
    """Dies in one of its writes."""

    dies_at: tuple[int, int]

    def append(self, batch: Any) -> None:
        number, num_bytes = self.dies_at
        type(self).dies_at = (number - 1, num_bytes)
        if number:
            super().append(batch)
            return
        message = memoryview(batch.serialize())
        self._file.write(message if num_bytes < 0 else message[:num_bytes])
        os.kill(os.getpid(), signal.SIGKILL)


def fill(folder: Path, child: dict[str, Any]) -> None:
    logging.basicConfig(level=logging.INFO, filename=folder / f"{child['name']}.log")
    if child.get("write"):
        DyingWriter.dies_at = tuple(child["write"])
        store.PartWriter = DyingWriter
    datasets = [TokenizedDataset(path) for path in sorted((folder / "data").iterdir())]
    cache = open_cache(folder / "cache", IDENTITY, datasets, Ranks(0, 1, 0, torch.device("cpu")), False)
    behind = folder / f"{child['behind']}.log" if "behind" in child else None
    scorer = LoggingScorer(folder, child.get("pause_s", 0.0), child.get("kill_s", math.inf), behind)
    cache.fill(scorer, Packer(1, 16, 30, True), scorer.all_durable)
    cache.reference()


def forked(folder: Path, child: dict[str, Any]) -> int:
    if pid := os.fork():
        return pid
    try:
        fill(folder, child)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main() -> None:
    for line in sys.stdin:
        path, children = json.loads(line)
        folder = Path(path)
        log = folder / "computed.jsonl"
        before = log.stat().st_size if log.exists() else 0
        pids = [forked(folder, child) for child in children]
        for pid, child in zip(pids, children, strict=True):
            if "kill_s" in child:
                while not log.exists() or log.stat().st_size == before:
                    time.sleep(0.001)
                time.sleep(child["kill_s"])
                os.kill(pid, signal.SIGKILL)
        ends = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print("ended", json.dumps(ends), flush=True)


if __name__ == "__main__":
    main()
