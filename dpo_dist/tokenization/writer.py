"""Tokenised examples written to an Arrow file in batches, and summed up."""

import hashlib
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from dpo_dist.data.arrow_arrays import arrow_array, arrow_strings
from dpo_dist.data.arrow_checks import checked_batch
from dpo_dist.tokenization.encode import TokenizedExample
from dpo_dist.tokenization.stored import example_from, examples_of
from dpo_dist.tokenization.summary import (
    BLOCK,
    EXAMPLES_FILE,
    PreferenceCounts,
    Summary,
    digest_of,
    write_summary,
)

# Bounds the memory of writing, and the 32-bit offsets of Arrow lists.
_ROWS_PER_BATCH = 1024
_TOKENS_PER_BATCH = 2**22

_MAGIC_BYTES = 8  # of an Arrow file, before what is a stream as well
_IDS = pa.list_(pa.int32())
_PAIR = pa.struct(
    [
        ("chosen", pa.int32()),
        ("rejected", pa.int32()),
        *((name, pa.float64()) for name in ("weight", "margin", "probability")),
    ]
)
_SCHEMA = pa.schema(
    [
        ("prompt_ids", _IDS),
        ("completion_ids", pa.list_(_IDS)),
        ("pairs", pa.list_(_PAIR)),
        ("source", pa.string()),
        ("weight", pa.float64()),
        ("ratings", pa.list_(pa.bool_())),
        ("entry", pa.int32()),
    ]
)


class ExampleWriter:
    """Writes examples to a folder, and sums them up; nothing is valid before `finish` returns."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = pa.OSFile(str(folder / EXAMPLES_FILE), "wb")
        self._stream = pa.ipc.new_file(self._file, _SCHEMA)
        self._buffer: list[TokenizedExample] = []
        self._ids: list[np.ndarray] = []
        """Of each example in the buffer those of its prompt and its completions, one behind the other."""
        self._digest = hashlib.sha256()
        self._max_token_id = -1
        self._buffered_tokens = 0
        self._bytes_digest, self._num_hashed = xxhash.xxh3_128(), 0  # of what is in the file
        self._num_batches = 0
        self.num_examples = 0
        self.num_tokens = 0
        self._preferences = PreferenceCounts()

    def state(self) -> dict[str, Any]:
        """What there is so far, as JSON values; `restore` of a new writer makes it the same one."""
        self._file.flush()
        with (self._folder / EXAMPLES_FILE).open("rb") as file:
            file.seek(self._num_hashed)
            while block := file.read(BLOCK):
                self._bytes_digest.update(block)
                self._num_hashed += len(block)
        return {
            "num_bytes": self._num_hashed,
            "digest": self._bytes_digest.hexdigest(),
            "fingerprint": self._digest.hexdigest(),
            "num_batches": self._num_batches,
            "buffer": [asdict(example) for example in self._buffer],
            "max_token_id": self._max_token_id,
            "num_examples": self.num_examples,
            "num_tokens": self.num_tokens,
            "preferences": asdict(self._preferences),
        }

    def restore(self, folder: Path, state: dict[str, Any]) -> None:
        """Take over what another writer has written to a folder until it gave its state.

        Raises:
            ValueError, KeyError, TypeError, OSError, pa.ArrowException: it is not that; this writer is of no use then.
        """
        if digest_of(folder / EXAMPLES_FILE, state["num_bytes"]) != state["digest"]:
            raise ValueError("it is damaged")
        with (folder / EXAMPLES_FILE).open("rb") as file:
            file.seek(_MAGIC_BYTES)
            stream = pa.ipc.open_stream(file) if state["num_batches"] else None
            for _ in range(state["num_batches"]):
                assert stream is not None
                batch = checked_batch(stream.read_next_batch())
                for example in examples_of(batch):
                    self._digest.update(_canonical_bytes(example, _ids_of(example)))
                self._write_batch(batch)
        for values in state["buffer"]:
            self.write(example_from(values))
        if self._digest.hexdigest() != state["fingerprint"]:
            raise ValueError("what was written is not what the journal says")
        self._max_token_id, self.num_examples = state["max_token_id"], state["num_examples"]
        self.num_tokens, self._preferences = state["num_tokens"], PreferenceCounts(**state["preferences"])

    def write(self, example: TokenizedExample) -> None:
        """Append one example."""
        ids = _ids_of(example)
        self._digest.update(_canonical_bytes(example, ids))
        self._max_token_id = max(self._max_token_id, int(np.maximum(ids, ~ids).max()))
        num_tokens = len(ids)
        self.num_examples += 1
        self.num_tokens += num_tokens
        self._preferences.add(example)
        self._preferences.num_given_tokens += int((ids < 0).sum())
        self._buffered_tokens += num_tokens
        self._buffer.append(example)
        self._ids.append(ids)
        if len(self._buffer) >= _ROWS_PER_BATCH or self._buffered_tokens >= _TOKENS_PER_BATCH:
            self._flush()

    def finish(self, bad_rows: dict[str, int], notes: dict[str, int], ignored_columns: list[str]) -> None:
        """Write what is left and the summary."""
        self._flush()
        self._stream.close()
        self.close()
        summary = Summary(
            num_examples=self.num_examples,
            digest=digest_of(self._folder / EXAMPLES_FILE),
            fingerprint=self._digest.hexdigest(),
            max_token_id=self._max_token_id,
            bad_rows=bad_rows,
            notes=notes,
            ignored_columns=ignored_columns,
            preferences=asdict(self._preferences),
        )
        write_summary(self._folder, summary)

    def close(self) -> None:
        """Close the file, finished or not."""
        self._file.close()

    def _flush(self) -> None:
        if not self._buffer:
            return
        columns = [
            *_id_columns(self._buffer, self._ids),
            _pair_column(self._buffer),
            arrow_strings([example.source for example in self._buffer]),
            arrow_array(np.array([example.weight for example in self._buffer], dtype=np.float64)),
            _rating_column(self._buffer),
            arrow_array(np.array([example.entry for example in self._buffer], dtype=np.int32)),
        ]
        self._write_batch(pa.record_batch(columns, schema=_SCHEMA))
        self._buffer.clear()
        self._ids.clear()
        self._buffered_tokens = 0

    def _write_batch(self, batch: pa.RecordBatch) -> None:
        self._stream.write_batch(batch)
        self._num_batches += 1


def _ids_of(example: TokenizedExample) -> np.ndarray:
    """Of prompt and completions, one behind the other."""
    return np.array([*example.prompt_ids, *chain.from_iterable(example.completion_ids)], dtype="<i4")


def _id_columns(examples: list[TokenizedExample], ids: list[np.ndarray]) -> tuple[pa.Array, pa.Array]:
    """Prompts and completions, made of whole arrays: from nested tuples it takes several times as long."""
    num_prompt = [len(example.prompt_ids) for example in examples]
    num_completion = [len(part) for example in examples for part in example.completion_ids]
    prompts = np.concatenate([one[:count] for one, count in zip(ids, num_prompt, strict=True)])
    completions = np.concatenate([one[count:] for one, count in zip(ids, num_prompt, strict=True)])
    flat = _lists(num_completion, arrow_array(completions))
    return _lists(num_prompt, arrow_array(prompts)), _lists([len(example.completion_ids) for example in examples], flat)


def _pair_column(examples: list[TokenizedExample]) -> pa.Array:
    pairs = [pair for example in examples for pair in example.pairs]
    fields = [
        arrow_array(
            np.array([getattr(pair, one.name) for pair in pairs], "i4" if one.type == pa.int32() else "f8"),
        )
        for one in _PAIR
    ]
    return _lists([len(example.pairs) for example in examples], pa.StructArray.from_arrays(fields, fields=list(_PAIR)))


def _rating_column(examples: list[TokenizedExample]) -> pa.Array:
    flat = np.array([good for example in examples for good in example.ratings], dtype=bool)
    return _lists([len(example.ratings) for example in examples], arrow_array(flat))


def _lists(lengths: list[int], values: pa.Array) -> pa.Array:
    """Lists of so many values each."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(arrow_array(offsets), values)


def _canonical_bytes(example: TokenizedExample, ids: np.ndarray) -> bytes:
    """The same bytes on every machine for the same ids and pairs: little-endian, every list after its length."""
    counts = [len(example.prompt_ids), len(example.completion_ids), *(len(part) for part in example.completion_ids)]
    pairs = [(pair.chosen, pair.rejected, pair.weight, pair.margin) for pair in example.pairs]
    # What few data have is hashed only where it is there; a negative count stands in front.
    more = [*(pair.probability for pair in example.pairs), example.weight, *(2.0 + good for good in example.ratings)]
    further = np.array([-len(more)], dtype="<i8").tobytes() + np.array(more, dtype="<f8").tobytes()
    return (
        np.array([*counts, len(pairs)], dtype="<i8").tobytes()
        + ids.tobytes()
        + np.array(pairs, dtype="<f8").tobytes()
        + (b"" if set(more) == {1.0} else further)
    )
