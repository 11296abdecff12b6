"""How long the texts of a data set are, and how often a rule that reads nothing would be right.

P pairs   E examples
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from dpo_dist.inspection.columns import PairColumns
from dpo_dist.inspection.findings import pairs_by_example

KEPT = 0.99  # of the examples, by the suggested data.max_length
_STEP = 64  # tokens; it is a multiple of them
_BINS = 20


@dataclass(frozen=True)
class Histogram:
    """Counts of values from 0 on, in equal steps; the last bin holds all that are larger.

    Attributes:
        width: of a bin.
        counts: of each.
        largest: value.
    """

    width: int
    counts: tuple[int, ...]
    largest: int


@dataclass(frozen=True)
class Rule:
    """A rule that knows nothing of the texts' quality.

    Attributes:
        says: which completion it takes for the better one.
        decides: pairs that it tells apart.
        right: the share of those in which it is right; None where it decides none.
    """

    says: str
    decides: int
    right: float | None


def histogram(values: np.ndarray) -> Histogram:
    """Twenty bins, wide enough for 99 of 100 values; the width is a power of two."""
    bound, width = float(np.percentile(values, 99)) + 1, 1
    while width * _BINS < bound:
        width *= 2
    counts = np.bincount(np.minimum(values // width, _BINS))
    return Histogram(width, tuple(counts.tolist()), int(values.max()))


def histograms(columns: PairColumns) -> dict[str, Histogram]:
    """Tokens of prompts, chosen and rejected completions, and of whole sequences: a prompt with one completion."""
    dataset = columns.dataset
    flat = dataset.completion_lengths.flat
    sequences = flat + np.repeat(dataset.prompt_lengths, np.diff(dataset.completion_lengths.starts))
    parts = {"prompt": dataset.prompt_lengths}
    if len(columns.example):
        parts |= {"chosen": flat[np.unique(columns.chosen)], "rejected": flat[np.unique(columns.rejected)]}
    else:
        parts |= {"completion": flat}
    return {name: histogram(values) for name, values in {**parts, "whole": sequences}.items()}


def suggested_length(columns: PairColumns) -> int:
    """The least multiple of 64 tokens that keeps 99 % of the examples, with all their completions."""
    lengths = columns.dataset.completion_lengths
    longest = columns.dataset.prompt_lengths + np.maximum.reduceat(lengths.flat, lengths.starts[:-1])
    enough = int(np.percentile(longest, 100 * KEPT, method="inverted_cdf"))
    return -(-enough // _STEP) * _STEP


def rules(columns: PairColumns) -> list[Rule]:
    """How often they are right, each among the pairs that it tells apart."""
    flat, learned = columns.dataset.completion_lengths.flat, columns.dataset.learned_lengths.flat
    found = [_rule("the longer completion", learned[columns.chosen], learned[columns.rejected])]
    listed = _in_lists(columns)
    if len(listed):
        # The place in the file is that in the row's list; the smaller one wins.
        found.append(_rule("the first in the row's list", -columns.chosen[listed], -columns.rejected[listed]))
    different = np.array([len(text) for text in columns.completion_shingles], dtype=np.int64)
    # The share of its runs of three tokens that a completion has once only, in thousandths.
    varied = 1000 * different // np.maximum(flat, 1)
    return [*found, _rule("the more varied completion", varied[columns.chosen], varied[columns.rejected])]


def _in_lists(columns: PairColumns) -> Int64[np.ndarray, " P"]:
    """Pairs of rows that hold a list of completions: pairs of columns have no order that could be a rule."""
    counts = np.diff(columns.dataset.completion_lengths.starts)
    if columns.dataset.preferences.num_ranked == len(columns.dataset):
        return np.arange(len(columns.example))
    listed = [pair for example, pairs in pairs_by_example(columns) if counts[example] > 2 for pair in pairs]
    return np.array(listed, dtype=np.int64)


def _rule(says: str, chosen: np.ndarray, rejected: np.ndarray) -> Rule:
    differs = chosen != rejected
    right = float((chosen > rejected)[differs].mean()) if differs.any() else None
    return Rule(says, int(differs.sum()), right)
