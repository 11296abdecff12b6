"""Tokenised examples, memory-mapped: any row in constant time.

Reading a row touches that row's pages only, so a data set may be larger than memory, and all ranks of a node share one
copy in the page cache. Columns become arrays by `np.from_dlpack`: their own `to_numpy` imports pandas where that is
installed.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import overload

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from dpo_dist.data import Pair
from dpo_dist.errors import DataError
from dpo_dist.tokenization.encode import TokenizedExample
from dpo_dist.tokenization.stored import example_in, row_ids
from dpo_dist.tokenization.summary import EXAMPLES_FILE, PreferenceCounts, read_summary
from dpo_dist.tokenization.turns import plain

_PERCENTILES = (5, 25, 50, 75, 95, 99)


@dataclass(frozen=True, eq=False)
class RaggedLengths(Sequence[tuple[int, ...]]):
    """Completion lengths in tokens: item i is the tuple of example i. Two flat arrays, however many examples."""

    flat: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.starts) - 1

    @overload
    def __getitem__(self, index: int) -> tuple[int, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[int, ...]]: ...
    def __getitem__(self, index: int | slice) -> tuple[int, ...] | list[tuple[int, ...]]:
        """Lengths of one example's completions, or of several examples'."""
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        return tuple(self.flat[self.starts[position] : self.starts[position + 1]].tolist())


@dataclass(frozen=True, eq=False)
class IdColumns:
    """Token ids of consecutive examples as they lie in the file: flat int32 arrays, and where each part begins."""

    prompt_ids: np.ndarray
    prompt_starts: np.ndarray  # of every example, and the end
    completion_ids: np.ndarray
    completion_starts: np.ndarray  # of every completion, and the end
    first_completion: np.ndarray  # of every example, counted from that of the first; and their number


@dataclass(frozen=True)
class Sample:
    """One example as text, for people."""

    source: str
    prompt: str
    completions: tuple[str, ...]


class TokenizedDataset(Sequence[TokenizedExample]):
    """All examples of a data set as token ids, in order; any row in constant time.

    Attributes:
        prompt_lengths: tokens of each prompt, int64, shape (examples,).
        weights: of each example, float64, shape (examples,).
        preferences: what kinds of preferences there are.
        completion_lengths: for each example, the tokens of each of its completions.
        fingerprint: hash of all ids and pairs, in order; the same on every machine, wherever the files are.
        bad_rows: rows left out, by reason.
        notes: rows used that the user should know about, by reason (truncated, ...).
        ignored_columns: names of the columns that mean nothing here, whatever source they are in.
        max_token_id: the largest id in any prompt or completion.
    """

    def __init__(self, folder: Path) -> None:
        """Map a finished folder.

        Raises:
            DataError: if the folder is not whole.
        """
        try:
            self._summary = read_summary(folder)
            reader = pa.ipc.open_file(pa.memory_map(str(folder / EXAMPLES_FILE)))
            self._batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
        except (OSError, ValueError, TypeError, pa.ArrowException) as error:
            raise DataError(f"{folder}: not a whole tokenised data set ({error}); delete the folder") from error
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)]).tolist()
        self.fingerprint = self._summary.fingerprint
        self.bad_rows = dict(self._summary.bad_rows)
        self.notes = dict(self._summary.notes)
        self.ignored_columns = tuple(self._summary.ignored_columns)
        self.max_token_id = self._summary.max_token_id
        self.preferences = PreferenceCounts(**self._summary.preferences)
        self.weights = _concatenated([np.from_dlpack(batch.column("weight")) for batch in self._batches])
        self.prompt_lengths = _concatenated([_list_lengths(batch.column("prompt_ids")) for batch in self._batches])
        nested = [batch.column("completion_ids") for batch in self._batches]
        counts = _concatenated([_list_lengths(column) for column in nested])
        self.completion_lengths = RaggedLengths(
            flat=_concatenated([_list_lengths(column.flatten()) for column in nested]),
            starts=np.concatenate([[0], np.cumsum(counts)]),
        )

    def __len__(self) -> int:
        """Number of examples."""
        return self._summary.num_examples

    @overload
    def __getitem__(self, index: int) -> TokenizedExample: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenizedExample]: ...
    def __getitem__(self, index: int | slice) -> TokenizedExample | list[TokenizedExample]:
        """One example, or several."""
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        return example_in(*self._locate(index))

    def id_columns(self) -> Iterator[IdColumns]:
        """The ids of all examples, in order, some at a time; nothing is copied."""
        for batch in self._batches:
            prompts, examples = batch.column("prompt_ids"), batch.column("completion_ids")
            yield IdColumns(
                prompt_ids=np.from_dlpack(prompts.values),
                prompt_starts=np.from_dlpack(prompts.offsets),
                completion_ids=np.from_dlpack(examples.values.values),
                completion_starts=np.from_dlpack(examples.values.offsets),
                first_completion=np.from_dlpack(examples.offsets),
            )

    def pairs_of(self, index: int) -> tuple[Pair, ...]:
        """The preference pairs of one example."""
        batch, row = self._locate(index)
        return tuple(Pair(**pair) for pair in batch.column("pairs")[row].as_py())

    def prompt_of(self, index: int) -> tuple[int, ...]:
        """The prompt of one example; nothing else of it is read."""
        batch, row = self._locate(index)
        return row_ids(batch.column("prompt_ids")[row].values)

    def ratings_of(self, index: int) -> tuple[bool, ...]:
        """Of each completion of an example whether it is called good; empty where the data do not say."""
        if not self.preferences.num_rated:
            return ()
        batch, row = self._locate(index)
        return tuple(batch.column("ratings")[row].as_py())

    @cached_property
    def learned_lengths(self) -> RaggedLengths:
        """For each example, the learned tokens of each of its completions."""
        lengths = self.completion_lengths
        if not self.preferences.num_given_tokens:
            return lengths
        counts = [
            np.add.reduceat((columns.completion_ids >= 0).astype(np.int64), columns.completion_starts[:-1])
            for columns in self.id_columns()
        ]
        return RaggedLengths(np.concatenate(counts), lengths.starts)

    def pair_columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of every pair its example, and its completions' places in `completion_lengths.flat`: chosen, and rejected."""
        nested = [batch.column("pairs") for batch in self._batches]
        example = np.repeat(np.arange(len(self)), _concatenated([_list_lengths(column) for column in nested]))
        first, pairs = self.completion_lengths.starts[example], [column.flatten() for column in nested]
        chosen, rejected = (
            first + _concatenated([np.from_dlpack(one.field(kind)) for one in pairs]) for kind in ("chosen", "rejected")
        )
        return example, chosen, rejected

    def source_of(self, index: int) -> str:
        """`path:line` of one example."""
        batch, row = self._locate(index)
        return batch.column("source")[row].as_py()

    def check_vocabulary(self, vocab_size: int) -> None:
        """Make sure that a model with `vocab_size` embeddings knows every token.

        Raises:
            DataError: naming the first row with an unknown id.
        """
        if self.max_token_id < vocab_size:
            return
        for start, batch in zip(self._starts, self._batches, strict=False):
            prompts, completions = batch.column("prompt_ids"), batch.column("completion_ids")
            largest = max(_largest(prompts.flatten()), _largest(completions.flatten().flatten()))
            if largest < vocab_size:
                continue
            for index in range(start, start + batch.num_rows):
                _check_example(self[index], vocab_size)

    def longest_sequence(self) -> tuple[int, int]:
        """The most tokens of a prompt with one completion, and the example that has them."""
        flat, starts = self.completion_lengths.flat, self.completion_lengths.starts
        sequences = flat + np.repeat(self.prompt_lengths, np.diff(starts))
        place = int(np.argmax(sequences))
        return int(sequences[place]), int(np.searchsorted(starts, place, side="right")) - 1

    @cached_property
    def most_tokens(self) -> int:
        """Of a prompt with one completion."""
        return self.longest_sequence()[0]

    def stats(self) -> dict[str, dict[str, int | float]]:
        """Token counts: min, percentiles, max, mean and sum of prompts, completions, sequences and examples.

        A `sequence` is a prompt with one completion (what data.max_length bounds), an `example` a prompt with all its
        completions (what packing.max_tokens bounds when prompts are shared). A percentile between two lengths is the
        longer one: each is a length that there is.
        """
        flat, starts = self.completion_lengths.flat, self.completion_lengths.starts
        sequences = flat + np.repeat(self.prompt_lengths, np.diff(starts))
        examples = self.prompt_lengths + np.add.reduceat(flat, starts[:-1])
        counts = {"prompt": self.prompt_lengths, "completion": flat, "sequence": sequences, "example": examples}
        return {name: _describe(values) for name, values in counts.items()}

    def sample(self, index: int, tokenizer: PreTrainedTokenizerBase | None = None) -> Sample:
        """One example as the model sees it, special tokens included; as numbers if there is no tokenizer."""
        example = self[index]

        def text(ids: tuple[int, ...]) -> str:
            if tokenizer is None:
                return " ".join(str(token) for token in ids)
            return str(
                tokenizer.decode(list(plain(ids)), skip_special_tokens=False, clean_up_tokenization_spaces=False)
            )

        return Sample(example.source, text(example.prompt_ids), tuple(text(ids) for ids in example.completion_ids))

    def _locate(self, index: int) -> tuple[pa.RecordBatch, int]:
        position = range(len(self))[index]
        number = bisect_right(self._starts, position) - 1
        return self._batches[number], position - self._starts[number]


def _check_example(example: TokenizedExample, vocab_size: int) -> None:
    parts = [
        ("prompt", example.prompt_ids),
        *((f"completion {i}", ids) for i, ids in enumerate(example.completion_ids)),
    ]
    for name, ids in parts:
        if max(plain(ids)) >= vocab_size:
            raise DataError(
                f"{example.source}: token id {max(plain(ids))} of the {name} is outside the model's "
                f"vocabulary (0 to {vocab_size - 1}); tokenise with the model's own tokenizer, "
                "or use the model the data was made for"
            )


def _list_lengths(lists: pa.ListArray) -> np.ndarray:
    return np.diff(np.from_dlpack(lists.offsets)).astype(np.int64)


def _concatenated(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int64)


def _largest(ids: pa.Array) -> int:
    values: np.ndarray = np.from_dlpack(ids)
    return int(np.maximum(values, np.invert(values)).max())  # ~id is -1 - id


def _describe(values: np.ndarray) -> dict[str, int | float]:
    percentiles = np.percentile(values, _PERCENTILES, method="higher")
    return {
        "min": int(values.min()),
        **{f"p{name}": int(value) for name, value in zip(_PERCENTILES, percentiles, strict=True)},
        "max": int(values.max()),
        "mean": float(values.mean()),
        "sum": int(values.sum()),
    }
