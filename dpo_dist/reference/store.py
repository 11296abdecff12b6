"""The folder of one reference's log-probabilities: read at any time, written by one process at a time.

    reference.json       what the values are valid for
    rows-000001.arrow    parts, each written by one process and never continued; the first row of a key counts
    .lock, .holder       held by the process that computes what is missing, and who that is

Reading needs no lock, and tolerates whatever a kill left behind. No process group.
"""

import logging
import os
import re
import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from filelock import FileLock, Timeout
from jaxtyping import Bool, Float32, UInt64

from dpo_dist.data.arrow_arrays import arrow_array
from dpo_dist.durable import sync
from dpo_dist.errors import ConfigError
from dpo_dist.reference.identity import CacheIdentity, check_identity, write_identity
from dpo_dist.reference.keys import DistinctKeys
from dpo_dist.reference.rows import SCHEMA, PartReader, has_tokens, keys_of, logps_of

MAX_PARTS = 64  # more are made one
_PART = re.compile(r"rows-(\d+)\.arrow")
_LOCK_FILE, _HOLDER_FILE, _STAGING_FILE = ".lock", ".holder", ".rows"
_ROWS_PER_BATCH = 2**16  # of a part that replaces many; bounds the memory of making it, and Arrow's 32-bit offsets
_TOKENS_PER_BATCH = 2**24
_ATTEMPTS = 5  # at reading a folder whose parts another process is making one
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredRows:
    """All sound rows of a folder, in the order they were written; a key may occur again."""

    keys: UInt64[np.ndarray, "N 2"]
    logps: Float32[np.ndarray, " N"]
    has_tokens: Bool[np.ndarray, " N"]


class ReferenceStore:
    """Rows of one reference in a folder.

    Args:
        folder: reference.cache_dir; need not exist.
        identity: of the reference.
    Raises:
        ConfigError: if the folder is another reference's, or no cache at all.
    """

    def __init__(self, folder: Path, identity: CacheIdentity) -> None:
        self.folder, self.identity = folder, identity
        self._check_identity()

    def state(self) -> tuple[tuple[str, int], ...]:
        """Names and sizes of all parts: equal when there is nothing new to read."""
        state = []
        for path in self._parts():
            with suppress(FileNotFoundError):  # made one with others meanwhile
                state.append((path.name, path.stat().st_size))
        return tuple(state)

    def read(self) -> StoredRows:
        """Everything that can be read and is as it was written. Says how many rows are not.

        Raises:
            ConfigError: if the folder cannot be read.
        """
        for attempt in range(_ATTEMPTS):
            try:
                return self._read()
            except OSError as error:
                if isinstance(error, FileNotFoundError) and attempt < _ATTEMPTS - 1:
                    continue  # another process has made the parts one
                raise ConfigError(
                    f"reference.cache_dir={self.folder} cannot be read ({error}); give another folder"
                ) from error
        raise AssertionError("the last attempt returns or raises")

    def why_not_writable(self) -> str:
        """The reason why nothing can be added, as far as it can be known without writing; empty if there is none."""
        existing = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        by_effective = os.access in os.supports_effective_ids
        if os.access(existing, os.W_OK | os.X_OK, effective_ids=by_effective):
            return ""
        return f"{existing} is read-only for this process"

    def refused(self, reason: object) -> ConfigError:
        """The error of a folder that lacks rows and takes none."""
        return ConfigError(
            f"reference.cache_dir={self.folder} lacks rows and cannot be written ({reason}); what was written before "
            "is kept; make it writable, free some space, or give another folder"
        )

    def try_lock(self, timeout_s: float) -> FileLock | None:
        """Become the one process that writes, until `release`; None if another one still is after a while.

        The system frees the lock if its holder dies.

        Raises:
            ConfigError: if the folder cannot be written, or is another reference's by now.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / _LOCK_FILE)
            lock.acquire(timeout=timeout_s)
        except Timeout:
            return None
        except (OSError, NotImplementedError) as error:
            raise self.refused(error) from error
        try:
            if not self._check_identity():
                write_identity(self.folder, self.identity)
            (self.folder / _HOLDER_FILE).write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
        except BaseException as error:
            lock.release()
            raise self.refused(error) if isinstance(error, OSError) else error from error
        return lock

    def holder(self) -> str:
        """Who computes rows now, as far as that is known."""
        try:
            return (self.folder / _HOLDER_FILE).read_text(encoding="utf-8").strip() or "another process"
        except (OSError, UnicodeDecodeError):
            return "another process"

    def new_part(self) -> "PartWriter":
        """Begin a part behind all others. Needs the lock."""
        return PartWriter(self._next_part())

    def compact(self) -> None:
        """Make many parts one, without what is damaged or there twice. Needs the lock; safe to kill at any moment."""
        parts = self._parts()
        if len(parts) <= MAX_PARTS:
            return
        staging = self.folder / _STAGING_FILE
        try:
            with staging.open("wb") as file, pa.ipc.new_stream(file, SCHEMA) as stream:
                for batch in _merged(self._needed(parts)):
                    stream.write_batch(batch)
            sync(staging)
            os.replace(staging, self._next_part())
            sync(self.folder)
            for path in reversed(parts):  # so that what is left at a kill still begins with the first row of every key
                path.unlink()
        except OSError as error:  # not worth ending a run
            _LOGGER.warning("%s: %d files cannot be made one (%s)", self.folder, len(parts), error)
            with suppress(OSError):
                staging.unlink(missing_ok=True)

    def _check_identity(self) -> bool:
        return check_identity(self.folder, self.identity, (_LOCK_FILE, _HOLDER_FILE))

    def _parts(self) -> list[Path]:
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return []
        numbers = {name: int(match[1]) for name in names if (match := _PART.fullmatch(name))}
        return [self.folder / name for name in sorted(numbers, key=lambda name: (numbers[name], name))]

    def _next_part(self) -> Path:
        parts = self._parts()
        last = _PART.fullmatch(parts[-1].name) if parts else None
        return self.folder / f"rows-{int(last[1]) + 1 if last else 1:06d}.arrow"

    def _read(self) -> StoredRows:
        readers = [PartReader(path, self.identity.seed) for path in self._parts()]
        keys, logps, tokens = [np.empty((0, 2), np.uint64)], [np.empty(0, np.float32)], [np.empty(0, bool)]
        for reader in readers:
            for batch in reader.batches():
                # Copied: the file is not kept open for them.
                keys.append(keys_of(batch).copy())
                logps.append(logps_of(batch).copy())
                tokens.append(has_tokens(batch))
        for reader in readers:
            if reader.num_damaged:
                _LOGGER.warning("%s: %d rows are damaged and count as missing", reader.path, reader.num_damaged)
            if reader.is_cut:
                rest = "the rest cannot be read, as after a kill, and counts as missing"
                _LOGGER.info("%s: %d rows read; %s", reader.path, reader.num_read, rest)
        return StoredRows(np.concatenate(keys), np.concatenate(logps), np.concatenate(tokens))

    def _needed(self, parts: list[Path]) -> Iterator[pa.RecordBatch]:
        """Of every key the first row, whose sum counts, and the first that has its tokens."""
        rows = self._read()
        needed = first_of_each(rows.keys, np.ones(len(rows.keys), dtype=bool))
        needed |= first_of_each(rows.keys, rows.has_tokens)
        begin = 0
        for path in parts:
            for batch in PartReader(path, self.identity.seed).batches():
                yield batch.filter(arrow_array(needed[begin : begin + batch.num_rows]))
                begin += batch.num_rows


class PartWriter:
    """One new part; what `append` has returned from is on the device."""

    def __init__(self, path: Path) -> None:
        # Never what another process has begun; unbuffered, so that nothing is written behind an error's back.
        self._file = path.open("xb", buffering=0)
        try:
            self._write(SCHEMA.serialize())
            sync(path.parent)
        except BaseException:
            self._file.close()
            raise

    def append(self, batch: pa.RecordBatch) -> None:
        """Add rows and wait until they are durable; after an error nothing more can be added."""
        self._write(batch.serialize())
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """End the part, whether or not all went well: a reader needs no end mark."""
        self._file.close()

    def _write(self, message: pa.Buffer) -> None:
        rest = memoryview(message)
        while rest:
            rest = rest[self._file.write(rest) :]


def first_of_each(keys: UInt64[np.ndarray, "N 2"], among: Bool[np.ndarray, " N"]) -> Bool[np.ndarray, " N"]:
    """Of every key, the first of its rows that are `among` those asked for."""
    rows = np.flatnonzero(among)
    chosen = np.zeros(len(keys), dtype=bool)
    chosen[rows[DistinctKeys(keys[rows]).first]] = True
    return chosen


def _merged(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The same rows in few batches of bounded size."""
    waiting: list[pa.RecordBatch] = []
    num_rows = num_tokens = 0
    for batch in batches:
        waiting.append(batch)
        num_rows += batch.num_rows
        num_tokens += len(batch.column("token_logps").flatten())
        if num_rows >= _ROWS_PER_BATCH or num_tokens >= _TOKENS_PER_BATCH:
            yield pa.concat_batches(waiting)
            waiting, num_rows, num_tokens = [], 0, 0
    if waiting:
        yield pa.concat_batches(waiting)
