"""Tokenised examples written to an Arrow file in batches, and summed up."""

import hashlib
import json
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from dpo_dist.data.arrow_arrays import arrow_array, arrow_strings
from dpo_dist.tokenization.encode import TokenizedExample

EXAMPLES_FILE = "examples.arrow"
SUMMARY_FILE = "summary.json"
# Bounds the memory of writing, and the 32-bit offsets of Arrow lists.
_ROWS_PER_BATCH = 1024
_TOKENS_PER_BATCH = 2**22

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


@dataclass(frozen=True)
class Summary:
    """What is known of a data set without reading its rows."""

    num_examples: int
    digest: str
    """xxh3_128 of the Arrow file."""
    fingerprint: str
    max_token_id: int
    bad_rows: dict[str, int]
    notes: dict[str, int]
    ignored_columns: list[str]
    preferences: dict[str, int]
    """As `PreferenceCounts`."""


@dataclass
class PreferenceCounts:
    """What kinds of preferences a data set holds."""

    num_pairs: int = 0
    max_completions: int = 0
    """Of one example."""
    num_ranked: int = 0
    """Examples whose rows held a list of completions."""
    num_weighted: int = 0
    """Examples with a pair whose weight is not 1, or that have another weight themselves."""
    num_margins: int = 0
    """Pairs with a margin other than 0."""
    num_given_margins: int = 0
    """Those of them that come from a column `margin`, not from scores."""
    num_soft_labels: int = 0
    """Pairs whose label is not sure."""
    num_rated: int = 0
    """Completions that are called good or bad, in no pair."""
    num_given_tokens: int = 0
    """Tokens of completions that are not learned."""
    num_desirable: int = 0
    """Those of them that are called good."""

    def add(self, example: TokenizedExample) -> None:
        """Count one example."""
        num_margins = sum(pair.margin != 0 for pair in example.pairs)
        self.num_pairs += len(example.pairs)
        self.max_completions = max(self.max_completions, len(example.completion_ids))
        self.num_ranked += example.is_ranked
        self.num_weighted += any(weight != 1 for weight in (example.weight, *(pair.weight for pair in example.pairs)))
        self.num_margins += num_margins
        self.num_given_margins += 0 if example.is_ranked else num_margins
        self.num_rated += len(example.ratings)
        self.num_desirable += sum(example.ratings)
        self.num_soft_labels += sum(pair.probability != 1 for pair in example.pairs)


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
        self.num_examples = 0
        self.num_tokens = 0
        self._preferences = PreferenceCounts()

    def write(self, example: TokenizedExample) -> None:
        """Append one example."""
        ids = np.array([*example.prompt_ids, *chain.from_iterable(example.completion_ids)], dtype="<i4")
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
            digest=_digest(self._folder / EXAMPLES_FILE),
            fingerprint=self._digest.hexdigest(),
            max_token_id=self._max_token_id,
            bad_rows=bad_rows,
            notes=notes,
            ignored_columns=ignored_columns,
            preferences=asdict(self._preferences),
        )
        values = asdict(summary)
        text = json.dumps({**values, "sha256": _seal(values)}, indent=2) + "\n"
        (self._folder / SUMMARY_FILE).write_text(text, encoding="utf-8")

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
        self._stream.write_batch(pa.record_batch(columns, schema=_SCHEMA))
        self._buffer.clear()
        self._ids.clear()
        self._buffered_tokens = 0


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


def read_summary(folder: Path) -> Summary:
    """What a folder's summary says.

    Raises:
        ValueError: it is not as it was written.
        OSError: it cannot be read.
    """
    values = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
    if not isinstance(values, dict) or values.pop("sha256", None) != _seal(values):
        raise ValueError(f"{SUMMARY_FILE} is damaged")
    return Summary(**values)


def is_whole(folder: Path) -> bool:
    """Whether a folder holds a finished data set, every byte as it was written.

    All of it is read: a flipped bit would be trained on, or end the process where a length is wrong.
    """
    try:
        return _digest(folder / EXAMPLES_FILE) == read_summary(folder).digest
    except (OSError, ValueError, TypeError):
        return False


def _digest(path: Path) -> str:
    """A hash of a whole file, at the pace of memory."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()


def _seal(values: dict[str, Any]) -> str:
    """A hash of everything else that a summary says."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
