"""What every rank sees of a cache of reference log-probabilities: `-m tests.processes.cache_worker FOLDER`, as JSON."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from dpo_dist.batch import RankWork
from dpo_dist.distributed import Ranks, barrier, process_group
from dpo_dist.packing import Packer, sizes_of
from dpo_dist.reference import CacheIdentity, ReferenceCache, numerics_of, open_cache
from dpo_dist.reference.keys import dataset_keys
from dpo_dist.reference.rows import make_batch
from dpo_dist.reference.store import ReferenceStore
from dpo_dist.tokenization import TokenizedDataset
from tests.launching import end_rank
from tests.stored_rows import KnownScorer, examples_of, save_dataset

IDENTITY = CacheIdentity("weights", "float32", numerics_of("sdpa"))
SCALE = 1e-5


class OneRankFails(KnownScorer):
    """Runs out of memory on the last rank."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self._fails = ranks.rank == ranks.world_size - 1

    def token_logps(self, batch):
        if self._fails:
            raise MemoryError("no room")
        return super().token_logps(batch)


class NotFinite(KnownScorer):
    """A model whose weights are broken."""

    def token_logps(self, batch):
        return super().token_logps(batch) / 0.0


def outcome(function: Callable[..., Any], *arguments: Any) -> list[str]:
    """Class and message of what a call raises; an empty list if nothing."""
    try:
        function(*arguments)
    except Exception as error:
        return [type(error).__name__, str(error)]
    return []


class Run:
    """One rank's view of the data sets and one folder after another."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self.folder, self.ranks = folder, ranks
        self.packer = Packer(ranks.world_size, 16, 48, True)
        first, others = examples_of(14, seed=1), examples_of(6, seed=2)
        # Rows of the first that repeat: within a data set, in another one, and beside new completions.
        mixed = [first[3], *others[:3], first[3], first[5], others[1]]
        contents = {"first": first, "mixed": mixed, "new": [*others, first[0]]}
        if ranks.is_first:
            for name, examples in contents.items():
                save_dataset(folder / "data" / name, examples)
        barrier()
        self.data = {name: TokenizedDataset(folder / "data" / name) for name in contents}

    def open(self, name: str, *datasets: str, tokens: bool = False) -> ReferenceCache:
        return open_cache(self.folder / name, IDENTITY, [self.data[one] for one in datasets], self.ranks, tokens)

    def answers(self, cache: ReferenceCache, name: str) -> list[list[Any]]:
        """Row, number and stored value of all completions of the rank's share of a plan of a whole data set."""
        dataset = self.data[name]
        rows = [*range(len(dataset))][::-1]
        plan = self.packer.plan(0, rows, sizes_of(dataset, rows))
        work = RankWork(plan, self.ranks.rank, dataset, True)
        values = cache.reference().completion_logps(work)
        assert values.dtype == torch.float32 and len(values) == work.num_completions
        numbered = [(row, k) for row in work.rows for k in range(len(dataset[row].completion_ids))]
        return [[row, k, value] for (row, k), value in zip(numbered, values.tolist(), strict=True)]

    def filling(self) -> dict[str, Any]:
        cache, scorer, progress = self.open("cache", "first", "mixed"), KnownScorer(), []
        seen: dict[str, Any] = {"empty": [cache.num_found, cache.num_missing]}
        seen["too early"] = outcome(cache.reference)
        cache.fill(scorer, self.packer, lambda done, total: progress.append([done, total]))
        seen |= {"computed": scorer.seen, "full": [cache.num_found, cache.num_missing], "progress": progress}
        seen["answers"] = {name: self.answers(cache, name) for name in ("first", "mixed")}
        seen["not looked up"] = outcome(self.answers, cache, "new")

        again, scorer = self.open("cache", "mixed", "first"), KnownScorer()
        seen["again"] = [again.num_found, again.num_missing]
        again.fill(scorer, self.packer)
        seen["computed again"] = scorer.seen
        seen["answers again"] = {name: self.answers(again, name) for name in ("first", "mixed")}

        more, scorer = self.open("cache", "new", "first"), KnownScorer()
        seen["more"] = [more.num_found, more.num_missing]
        more.fill(scorer, self.packer)
        seen["computed for more"] = scorer.seen
        seen["answers for more"] = {name: self.answers(more, name) for name in ("first", "new")}
        return seen

    def tokens(self) -> dict[str, Any]:
        """Values of tokens come after the sums, from a model that rounds in another way."""
        self.open("tokens", "first").fill(KnownScorer(), self.packer)
        cache, scorer = self.open("tokens", "first", "new", tokens=True), KnownScorer(error=1e-3)
        seen: dict[str, Any] = {"before": [cache.num_found, cache.num_missing]}
        cache.fill(scorer, self.packer)
        seen |= {"computed": scorer.seen, "answers": self.answers(cache, "first"), "new": self.answers(cache, "new")}
        again = self.open("tokens", "first", "new", tokens=True)
        seen["after"] = [again.num_found, again.num_missing, *self.answers(again, "first")]
        seen["stored"] = self.stored_tokens() if self.ranks.is_first else []
        return seen

    def stored_tokens(self) -> list[list[Any]]:
        """Row, number, sum and tokens' values of the first data set's rows that have any."""
        keys = [key.tobytes() for key in dataset_keys([self.data["first"]])]
        places = [
            (row, k) for row, example in enumerate(self.data["first"]) for k in range(len(example.completion_ids))
        ]
        found = []
        for path in sorted((self.folder / "tokens").glob("rows-*")):
            for row in pa.ipc.open_stream(path.read_bytes()).read_all().to_pylist():
                if row["token_logps"] is not None and row["key"] in keys:
                    found.append([*places[keys.index(row["key"])], row["logps"], row["token_logps"]])
        return sorted(found)

    def verifying(self) -> dict[str, Any]:
        cache = self.open("cache", "first", "new")
        scorer, off = KnownScorer(), KnownScorer(error=0.01)
        seen: dict[str, Any] = {"honest": outcome(cache.verify, scorer, self.packer, 9, SCALE), "asked": scorer.seen}
        seen["everything"] = outcome(cache.verify, KnownScorer(), self.packer, 10_000, SCALE)
        seen["another model"] = outcome(cache.verify, off, self.packer, 3, SCALE)
        seen["not finite"] = outcome(cache.verify, NotFinite(), self.packer, 3, SCALE)
        seen["trusted"] = outcome(cache.verify, off, self.packer, 0, SCALE)
        self.plant("planted", wrong=5)
        planted = self.open("planted", "first")
        seen["planted"] = outcome(planted.verify, KnownScorer(), self.packer, 10_000, SCALE)
        fresh = self.open("fresh", "first")
        fresh.fill(off, self.packer)
        # What this run has computed itself is no proof of a folder.
        seen["own"] = outcome(fresh.verify, KnownScorer(), self.packer, 10_000, SCALE)
        return seen

    def plant(self, name: str, wrong: int) -> None:
        """A cache of the first data set with one value that is 0.75 nats off, under a right checksum."""
        if self.ranks.is_first:
            store = ReferenceStore(self.folder / name, IDENTITY)
            lock = store.try_lock(0.0)
            assert lock is not None
            cache = self.only_here("cache", "first")
            sums = cache.copy()
            sums[wrong] += 0.75
            part, dataset = store.new_part(), self.data["first"]
            lengths = dataset.completion_lengths.flat
            part.append(make_batch(dataset_keys([dataset]), lengths, sums, None, IDENTITY.seed))
            part.close()
            lock.release()
        barrier()

    def only_here(self, name: str, data: str) -> np.ndarray:
        """Stored values of a data set, read without the other ranks."""
        stored = ReferenceStore(self.folder / name, IDENTITY).read()
        by_key = {key.tobytes(): value for key, value in zip(stored.keys, stored.logps, strict=True)}
        return np.array([by_key[key.tobytes()] for key in dataset_keys([self.data[data]])], dtype=np.float32)

    def failing(self) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for name, scorer in (("one rank", OneRankFails(self.ranks)), ("not finite", NotFinite())):
            cache = self.open("failing", "first")
            seen[name] = outcome(cache.fill, scorer, self.packer)
        seen["missing"] = self.open("failing", "first").num_missing
        other = CacheIdentity("other", "float32", "1-sdpa")
        seen["other"] = outcome(open_cache, self.folder / "cache", other, [self.data["first"]], self.ranks, False)
        mine = self.data["first" if self.ranks.is_first else "new"]
        seen["data differ"] = outcome(open_cache, self.folder / "cache", IDENTITY, [mine], self.ranks, False)
        return seen


if __name__ == "__main__":
    with process_group() as group:
        run = Run(Path(sys.argv[1]), group)
        observed = {
            "filling": run.filling(),
            "tokens": run.tokens(),
            "verifying": run.verifying(),
            "failing": run.failing(),
        }
        (run.folder / f"{group.rank}.json").write_text(json.dumps(observed), encoding="utf-8")
    end_rank()
