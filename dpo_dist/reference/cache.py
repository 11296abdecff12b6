"""Stored log-probabilities of one reference: computed once, row by row, and looked up from then on.

The first rank alone reads and writes the folder, so no file system has to be shared. Every rank holds one float32 and
one byte per completion of the run's data sets, and until `fill` has returned the places of those that are missing.

    N completions of all data sets, in the order of their `completion_lengths.flat`
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from jaxtyping import Float32, Int64
from torch import Tensor

from dpo_dist.distributed import Ranks, broadcast_json, broadcast_tensor, raising_together, require_agreement
from dpo_dist.errors import ConfigError, NumericsError
from dpo_dist.noise import RMS_LIMIT, honest, is_rounding
from dpo_dist.packing import Packer
from dpo_dist.reference.cached import CachedReference
from dpo_dist.reference.identity import CacheIdentity
from dpo_dist.reference.keys import dataset_keys
from dpo_dist.reference.lookup import MISSING, REPEATED, STORED, TOKENS_MISSING, Lookup, look_up
from dpo_dist.reference.rows import make_batch
from dpo_dist.reference.selection import Scorer, Scores, Selection, places_of, plans, score
from dpo_dist.reference.store import ReferenceStore
from dpo_dist.tokenization import TokenizedDataset

_WAIT_S = 10.0  # for the lock, before all ranks hear that it is not free yet; far below a collective's time limit
_LOGGER = logging.getLogger(__name__)


def open_cache(
    folder: Path,
    identity: CacheIdentity,
    datasets: Sequence[TokenizedDataset],
    ranks: Ranks,
    store_token_logps: bool,
    rows: Sequence[Int64[np.ndarray, " R"] | None] | None = None,
) -> "ReferenceCache":
    """Look every completion of some data sets up; nothing is written. Collective.

    Args:
        folder: reference.cache_dir, on the first rank's machine; need not exist.
        identity: of this run's reference.
        datasets: of the run; the same on every rank.
        ranks: where this process stands.
        store_token_logps: a row counts as found only if it has the value of every token.
        rows: of each data set, the examples that will be asked for; None: all.
    Raises:
        ConfigError: if the folder is another reference's, no cache at all, or cannot be read.
    """
    require_agreement({"the tokenised data": ", ".join(dataset.fingerprint for dataset in datasets)})
    return ReferenceCache(folder, identity, datasets, ranks, store_token_logps, rows or [None] * len(datasets))


class ReferenceCache:
    """The stored values of the completions of some data sets; made by `open_cache`.

    Attributes:
        folder: where they are, on the first rank's machine.
        num_found: different completions whose row is stored.
        num_missing: different completions that have to be computed; 0 after `fill`.
    """

    def __init__(
        self,
        folder: Path,
        identity: CacheIdentity,
        datasets: Sequence[TokenizedDataset],
        ranks: Ranks,
        store_token_logps: bool,
        rows: Sequence[Int64[np.ndarray, " R"] | None],
    ) -> None:
        self.folder, self._identity, self._ranks = folder, identity, ranks
        self._datasets, self._with_tokens = tuple(datasets), store_token_logps
        self._needed = places_of(datasets, rows)
        self._store: ReferenceStore | None = None  # on the first rank
        self._look_up()

    def require_writable(self) -> None:
        """Make sure, as far as possible without writing, that `fill` can store what is missing. Not collective.

        Raises:
            ConfigError: the same on every rank.
        """
        if self._problem and self.num_missing:
            raise ConfigError(self._problem)

    def fill(self, scorer: Scorer, packer: Packer, progress: Callable[[int, int], None] | None = None) -> None:
        """Compute and store every missing row; each is on the device before the next chunk is begun. Collective.

        Args:
            scorer: of the reference.
            packer: of the run; its bins for the reference are filled.
            progress: called on every rank after each chunk, with rows done and rows that were missing.
        Raises:
            ConfigError: if the folder cannot be written.
            NumericsError: if a log-probability is not finite.
        """
        if not self.num_missing:
            return
        self.require_writable()
        lock = self._lock()
        try:
            self._read_again()
            self._compute_missing(scorer, packer, progress)
        finally:
            if lock is not None:
                lock.release()

    def verify(self, scorer: Scorer, packer: Packer, num_rows: int, scale: float) -> int:
        """Compute some rows that were found in the folder once more, spread over all data sets. Collective.

        Args:
            scorer: of the reference.
            packer: of the run.
            num_rows: at most so many.
            scale: noise of the scorer's precision, nats per sqrt(token): `noise.NOISE_PER_SQRT_TOKEN`.
        Returns:
            How many there were.
        Raises:
            ConfigError: on every rank, if values differ by more than rounding explains.
        """
        found = np.flatnonzero(self._from_folder)
        spread = np.linspace(0, len(found) - 1, min(num_rows, len(found))).round().astype(np.int64)
        selection = Selection(self._datasets, found[spread])
        stored, lengths, again = [], [], []
        for plan in plans(selection, packer):
            scores = score(scorer, plan, selection, packer, self._ranks.rank, with_tokens=False)
            stored.append(self._values[found[spread][scores.chunk]])
            lengths.append(scores.num_tokens)
            again.append(scores.logps)
        if again:
            known, new, tokens = (torch.from_numpy(np.concatenate(x)).double() for x in (stored, again, lengths))
            self._judge(known, new, tokens, scale)
        return len(spread)

    def reference(self) -> CachedReference:
        """The stored values as a source of the reference's log-probabilities.

        Raises:
            RuntimeError: while rows are missing.
        """
        if self.num_missing:
            raise RuntimeError(f"{self.folder}: {self.num_missing} rows are missing; call fill first")
        bases = np.cumsum([0, *(len(dataset.completion_lengths.flat) for dataset in self._datasets)]).tolist()
        return CachedReference(self._datasets, tuple(bases), torch.from_numpy(self._values), self._ranks.device)

    # ---- what is stored

    def _look_up(self) -> None:
        """Read the folder on the first rank, and tell all what is in it. Collective."""
        found, state, keys, problem = None, (), np.empty((0, 2), dtype=np.uint64), ""
        with raising_together():
            if self._ranks.is_first:
                self._store = ReferenceStore(self.folder, self._identity)
                state = self._store.state()
                keys = dataset_keys(self._datasets)
                found = look_up(keys[self._needed], self._store.read(), self._with_tokens)
                reason = self._store.why_not_writable()
                problem = str(self._store.refused(reason)) if reason else ""
        self._state = state
        self._problem = broadcast_json(problem)
        found = self._spread(found)
        num_values = sum(len(dataset.completion_lengths.flat) for dataset in self._datasets)
        self._values = np.full(num_values, np.nan, dtype=np.float32)
        self._status = np.full(num_values, STORED, dtype=np.uint8)
        self._values[self._needed], self._status[self._needed] = found.values, found.status
        self._sources = self._needed[found.sources]
        self._from_folder = ~np.isnan(self._values)
        self._missing: Int64[np.ndarray, " I"] = np.flatnonzero(
            (self._status == MISSING) | (self._status == TOKENS_MISSING)
        )
        self._missing_keys = keys[self._missing] if self._ranks.is_first else keys
        self.num_missing = len(self._missing)
        self.num_found = found.num_distinct - self.num_missing

    def _spread(self, found: Lookup | None) -> Lookup:
        """The first rank's lookup on every rank, as tensors: there may be millions."""
        sizes = [len(found.sources), found.num_distinct] if found else []
        num_sources, num_distinct = broadcast_json(sizes)
        num_values = len(self._needed)
        values = torch.from_numpy(found.values) if found else torch.empty(num_values)
        status = torch.from_numpy(found.status) if found else torch.empty(num_values, dtype=torch.uint8)
        sources = torch.from_numpy(found.sources) if found else torch.empty(num_sources, dtype=torch.int64)
        for tensor in (values, status, sources):
            broadcast_tensor(tensor)
        return Lookup(values.numpy(), status.numpy(), sources.numpy(), num_distinct)

    def _lock(self) -> FileLock | None:
        """Wait until no other run computes rows of this reference; the lock is the first rank's. Collective."""
        lock, said = None, False
        while True:
            with raising_together():
                if self._store is not None:
                    lock = self._store.try_lock(_WAIT_S if said else 0.0)
            # In turns, so that no rank waits in a collective for longer than it may.
            if broadcast_json(lock is not None):
                return lock
            if self._store is not None and not said:
                _LOGGER.info("%s: waiting for %s, which computes rows", self.folder, self._store.holder())
            said = True

    def _read_again(self) -> None:
        """Use what another run has stored since the folder was read, and make many parts one. Collective."""
        changed = False
        with raising_together():
            if self._store is not None:
                changed = self._store.state() != self._state
        if broadcast_json(changed):
            self._look_up()
        with raising_together():
            if self._store is not None:
                self._store.compact()

    # ---- what is missing

    def _compute_missing(self, scorer: Scorer, packer: Packer, progress: Callable[[int, int], None] | None) -> None:
        selection = Selection(self._datasets, self._missing)
        with self._appending() as append:
            for plan in plans(selection, packer):
                scores = score(scorer, plan, selection, packer, self._ranks.rank, self._with_tokens)
                self._require_finite(scores, selection)
                places = self._missing[scores.chunk]
                # A sum that was stored stays what it was, to the last bit, when the tokens' values are added.
                is_new = self._status[places] == MISSING
                self._values[places[is_new]] = scores.logps[is_new]
                append(scores, self._values[places])
                if progress is not None:
                    progress(scores.chunk.stop, len(self._missing))
        self._values[self._status == REPEATED] = self._values[self._sources]
        self._status[:] = STORED
        self._missing, self._missing_keys = self._missing[:0], self._missing_keys[:0]
        self._sources, self.num_found, self.num_missing = self._sources[:0], self.num_found + self.num_missing, 0

    @contextmanager
    def _appending(self) -> Iterator[Callable[[Scores, Float32[np.ndarray, " C"]], None]]:
        """A collective function that makes a chunk durable: its scores, with the sums to be stored."""
        store, part = self._store, None

        def append(scores: Scores, sums: Float32[np.ndarray, " C"]) -> None:
            nonlocal part
            with raising_together():
                if store is None:
                    return
                batch = make_batch(
                    self._missing_keys[scores.chunk], scores.num_tokens, sums, scores.token_logps, store.identity.seed
                )
                try:
                    part = part or store.new_part()
                    part.append(batch)
                except OSError as error:
                    raise store.refused(error) from error

        try:
            yield append
        finally:
            if part is not None:
                part.close()

    def _require_finite(self, scores: Scores, selection: Selection) -> None:
        wrong = np.flatnonzero(~np.isfinite(scores.logps))
        if len(wrong):
            raise NumericsError(
                f"{selection.source(scores.chunk.start + int(wrong[0]))}: the reference gives a completion the "
                f"log-probability {scores.logps[wrong[0]]}, which is not finite; it is not stored"
            )

    def _judge(self, stored: Tensor, again: Tensor, lengths: Tensor, scale: float) -> None:
        if not torch.isfinite(again).all():
            raise NumericsError(
                "the reference gives log-probabilities that are not finite, which it did not when they were stored; a "
                "weight in its folder is NaN or infinite: copy the model again"
            )
        difference, bound = (again - stored).abs(), honest(lengths, stored, scale)
        excess = difference / bound
        if is_rounding(excess.tolist()):
            return
        worst = int(excess.nan_to_num(torch.inf).argmax())
        num_wrong = int((~(excess <= RMS_LIMIT)).sum())
        raise ConfigError(
            f"{self.folder}: stored log-probabilities are not those of this reference: of {len(excess)} rows computed "
            f"again {num_wrong} differ by up to {difference[worst]:.3g} nats, rounding explains "
            f"{RMS_LIMIT * bound[worst]:.2g}; the cache is stale or damaged: delete it, or set another "
            "reference.cache_dir"
        )
