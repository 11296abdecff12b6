"""Rows of log-probabilities in Arrow, each with a checksum over all of it.

    N rows   V values of single tokens, of all rows together

A part is an Arrow IPC stream that one process wrote and no other continues. It may end anywhere: what was written
before is read, and a row whose checksum is wrong does not exist.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from jaxtyping import Bool, Float32, Int64, UInt64

from dpo_dist.data.arrow_arrays import arrow_array, numpy_array
from dpo_dist.reference.keys import KEY_BYTES

SCHEMA = pa.schema(
    [
        pa.field("key", pa.binary(KEY_BYTES), nullable=False),
        pa.field("num_tokens", pa.int32(), nullable=False),
        pa.field("logps", pa.float32(), nullable=False),
        pa.field("token_logps", pa.list_(pa.field("item", pa.float32(), nullable=False))),
        pa.field("checksum", pa.uint64(), nullable=False),
    ]
)
_NEVER_NULL = [field.name for field in SCHEMA if not field.nullable]
# What the checksum covers of a row beside its tokens' values, without padding.
_HEADER = np.dtype(
    [("key", "<u8", 2), ("logps", "<f4"), ("num_tokens", "<i4"), ("has_tokens", "<i4")],
)


def make_batch(
    keys: UInt64[np.ndarray, "N 2"],
    num_tokens: Int64[np.ndarray, " N"],
    logps: Float32[np.ndarray, " N"],
    token_logps: Float32[np.ndarray, " V"] | None,
    seed: int,
) -> pa.RecordBatch:
    """Rows as they are written.

    Args:
        keys: see keys.py.
        num_tokens: of each completion.
        logps: their sums, nats.
        token_logps: of every token of all rows, one row after another; or None.
        seed: `CacheIdentity.seed`.
    """
    ends = np.cumsum(num_tokens)
    has_tokens = np.full(len(keys), token_logps is not None)
    if token_logps is None:
        lists, starts, values = pa.nulls(len(keys), SCHEMA.field("token_logps").type), np.zeros(1, "i4"), b""
    else:
        starts, values = np.concatenate([[0], ends]).astype(np.int32), token_logps.astype("<f4").tobytes()
        lists = pa.ListArray.from_arrays(
            arrow_array(starts), arrow_array(token_logps), SCHEMA.field("token_logps").type
        )
    headers = _headers(keys, num_tokens, logps, has_tokens)
    columns = [
        pa.FixedSizeBinaryArray.from_buffers(pa.binary(KEY_BYTES), len(keys), [None, pa.py_buffer(keys.tobytes())]),
        arrow_array(num_tokens.astype(np.int32)),
        arrow_array(logps.astype(np.float32)),
        lists,
        arrow_array(_checksums(headers, starts, values, seed).astype(np.uint64)),
    ]
    return pa.record_batch(columns, schema=SCHEMA)


class PartReader:
    """All that can be read of a part.

    Attributes:
        path: of the part.
        num_read: sound rows so far.
        num_damaged: rows left out so far because their checksum is wrong.
        is_cut: whether the part ends with something that cannot be read.
    """

    def __init__(self, path: Path, seed: int) -> None:
        self.path, self._seed = path, seed
        self.num_read = self.num_damaged = 0
        self.is_cut = False

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Sound rows, in the order they were written.

        Raises:
            FileNotFoundError: if the part has gone.
        """
        for batch in self._readable():
            sound = is_sound(batch, self._seed)
            self.num_read += int(sound.sum())
            if sound.all():
                yield batch
            else:
                self.num_damaged += int((~sound).sum())
                yield batch.filter(arrow_array(sound))

    def _readable(self) -> Iterator[pa.RecordBatch]:
        if not self.path.stat().st_size:
            return
        with pa.memory_map(str(self.path)) as file:
            try:
                reader = pa.ipc.open_stream(file)
                if not reader.schema.equals(SCHEMA):
                    raise pa.ArrowInvalid("not our columns")
                while True:
                    batch = reader.read_next_batch()
                    # Offsets and sizes are part of what may be damaged, and Arrow trusts them from here on.
                    batch.validate(full=True)
                    yield batch
            except StopIteration:
                return
            # Damaged bytes make Arrow raise nearly anything.
            except (pa.ArrowException, OSError, ValueError, TypeError, MemoryError, OverflowError):
                self.is_cut = True


def is_sound(batch: pa.RecordBatch, seed: int) -> Bool[np.ndarray, " N"]:
    """Which rows are as they were written, by this reference."""
    if any(batch.column(name).null_count for name in _NEVER_NULL):
        return np.zeros(batch.num_rows, dtype=bool)
    lists = batch.column("token_logps")
    headers = _headers(keys_of(batch), _column(batch, "num_tokens"), _column(batch, "logps"), has_tokens(batch))
    values = numpy_array(lists.values).astype("<f4").tobytes()
    return _checksums(headers, numpy_array(lists.offsets), values, seed) == _column(batch, "checksum")


def keys_of(batch: pa.RecordBatch) -> UInt64[np.ndarray, "N 2"]:
    """The column `key` as halves; see keys.py."""
    column = batch.column("key")
    if not len(column):
        return np.empty((0, 2), dtype=np.uint64)
    raw = np.frombuffer(column.buffers()[1], dtype="<u8", count=2 * len(column), offset=KEY_BYTES * column.offset)
    return raw.reshape(-1, 2)


def logps_of(batch: pa.RecordBatch) -> Float32[np.ndarray, " N"]:
    """The column `logps`."""
    return _column(batch, "logps")


def has_tokens(batch: pa.RecordBatch) -> Bool[np.ndarray, " N"]:
    """Which rows hold a value for every token."""
    return numpy_array(batch.column("token_logps").is_valid())


def _column(batch: pa.RecordBatch, name: str) -> Any:
    return numpy_array(batch.column(name))


def _headers(keys: np.ndarray, num_tokens: np.ndarray, logps: np.ndarray, tokens_are_there: np.ndarray) -> np.ndarray:
    headers = np.empty(len(keys), dtype=_HEADER)
    headers["key"], headers["logps"] = keys, logps
    headers["num_tokens"], headers["has_tokens"] = num_tokens, tokens_are_there
    return headers


def _checksums(headers: np.ndarray, starts: np.ndarray, values: bytes, seed: int) -> UInt64[np.ndarray, " N"]:
    """Of rows whose tokens' values lie between `starts` in `values`, if they have any."""
    raw, size = memoryview(headers.tobytes()), _HEADER.itemsize
    if not headers["has_tokens"].any():
        sums = [xxhash.xxh3_64_intdigest(raw[at : at + size], seed) for at in range(0, len(raw), size)]
        return np.array(sums, dtype=np.uint64)
    sums, tokens, bounds = [], memoryview(values), (4 * starts.astype(np.int64)).tolist()
    for row, is_there in enumerate(headers["has_tokens"].tolist()):
        row_sum = xxhash.xxh3_64(raw[row * size : (row + 1) * size], seed)
        if is_there:
            row_sum.update(tokens[bounds[row] : bounds[row + 1]])
        sums.append(row_sum.intdigest())
    return np.array(sums, dtype=np.uint64)
