"""Tokenised examples out of what they were written to: rows of a record batch, or JSON values."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from dpo_dist.data import Pair
from dpo_dist.tokenization.encode import TokenizedExample


def example_in(batch: pa.RecordBatch, row: int) -> TokenizedExample:
    """One row."""
    return TokenizedExample(
        prompt_ids=row_ids(batch.column("prompt_ids")[row].values),
        completion_ids=tuple(row_ids(ids.values) for ids in batch.column("completion_ids")[row]),
        pairs=tuple(Pair(**pair) for pair in batch.column("pairs")[row].as_py()),
        source=batch.column("source")[row].as_py(),
        weight=batch.column("weight")[row].as_py(),
        ratings=tuple(batch.column("ratings")[row].as_py()),
        entry=batch.column("entry")[row].as_py(),
    )


def examples_of(batch: pa.RecordBatch) -> Iterator[TokenizedExample]:
    """All rows."""
    return (example_in(batch, row) for row in range(batch.num_rows))


def example_from(values: Mapping[str, Any]) -> TokenizedExample:
    """What `dataclasses.asdict` made of it, back from JSON."""
    return TokenizedExample(
        **{
            **values,
            "prompt_ids": tuple(values["prompt_ids"]),
            "completion_ids": tuple(map(tuple, values["completion_ids"])),
            "pairs": tuple(Pair(**pair) for pair in values["pairs"]),
            "ratings": tuple(values["ratings"]),
        }
    )


def row_ids(values: pa.Array) -> tuple[int, ...]:
    """Token ids of one list."""
    return tuple(np.from_dlpack(values).tolist())
