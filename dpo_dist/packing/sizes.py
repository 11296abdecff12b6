"""What the packer has to know of an example: its lengths."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from dpo_dist.data import Pair
from dpo_dist.tokenization import TokenizedDataset


@dataclass(frozen=True)
class ExampleSize:
    """What the packer has to know of one example."""

    prompt: int  # tokens
    completions: tuple[int, ...]  # tokens of each completion
    pairs: tuple[Pair, ...]
    weight: float = 1.0
    learned: tuple[int, ...] | None = None  # of these tokens those that are learned; None: all
    ratings: tuple[bool, ...] = ()  # of each completion whether it is called good; empty where the data do not say

    @property
    def rated_weight(self) -> float:
        """Its weight, once for each rated completion."""
        return self.weight * len(self.ratings)

    @property
    def pair_weight(self) -> float:
        """Sum of the weights of its pairs."""
        return math.fsum(pair.weight for pair in self.pairs)

    @property
    def demonstrated_tokens(self) -> float:
        """Learned tokens of the chosen completions, each times the weight of the pairs that it is chosen in.

        Without pairs every completion is a demonstration, or of rated ones those that are called good, and has the
        example's weight.
        """
        lengths = self.completions if self.learned is None else self.learned
        if self.ratings:
            good = (length for length, is_good in zip(lengths, self.ratings, strict=True) if is_good)
            return self.weight * sum(good)
        if not self.pairs:
            return self.weight * sum(lengths)
        return math.fsum(pair.weight * lengths[pair.chosen] for pair in self.pairs)

    @property
    def unshared_tokens(self) -> int:
        """Tokens where every pair, or demonstration, is computed on its own: 2 P + C + R, or P + C."""
        if not self.pairs:
            return len(self.completions) * self.prompt + sum(self.completions)
        ends = [(pair.chosen, pair.rejected) for pair in self.pairs]
        return sum(2 * self.prompt + self.completions[chosen] + self.completions[rejected] for chosen, rejected in ends)

    @property
    def longest_rows(self) -> list[int]:
        """For every pair, tokens of the prompt with its longer completion."""
        return [
            self.prompt + max(self.completions[pair.chosen], self.completions[pair.rejected]) for pair in self.pairs
        ]

    def input_tokens(self, share_prompt: bool) -> int:
        """Tokens of the packed forward; the last token of a completion is never an input."""
        copies = 1 if share_prompt else len(self.completions)
        return copies * self.prompt + sum(self.completions) - len(self.completions)


@dataclass(frozen=True)
class Lengths:
    """The lengths of E examples and their C completions, for arithmetic on all of them at once."""

    prompt_E: Int64[np.ndarray, " E"]  # tokens
    completion_C: Int64[np.ndarray, " C"]  # tokens, one example after another
    count_E: Int64[np.ndarray, " E"]  # completions of an example

    @classmethod
    def of(cls, sizes: Sequence[ExampleSize]) -> "Lengths":
        """Those of some examples."""
        return cls(
            np.array([size.prompt for size in sizes], dtype=np.int64),
            np.array([length for size in sizes for length in size.completions], dtype=np.int64),
            np.array([len(size.completions) for size in sizes], dtype=np.int64),
        )

    @property
    def scored_tokens(self) -> Int64[np.ndarray, " E"]:
        """Tokens whose log-probability is asked for."""
        return self._added(self.completion_C)

    def input_tokens(self, share_prompt: bool) -> Int64[np.ndarray, " E"]:
        """`ExampleSize.input_tokens` of each."""
        copies = 1 if share_prompt else self.count_E
        return copies * self.prompt_E + self.scored_tokens - self.count_E

    def visible_keys(self, share_prompt: bool, window: int | None) -> Int64[np.ndarray, " E"]:
        """Pairs of a query and a key that it sees, in one layer: what attention is computed over.

        Args:
            share_prompt: compute the prompt once, or once per completion.
            window: keys that a query sees at most, itself among them; None: all before it.
        """
        whole = self._added(_seen(np.repeat(self.prompt_E, self.count_E) + self.completion_C - 1, window))
        twice = self.count_E - 1 if share_prompt else 0
        return whole - twice * _seen(self.prompt_E, window)

    def _added(self, values_C: Int64[np.ndarray, " C"]) -> Int64[np.ndarray, " E"]:
        """Sums over each example's completions."""
        sums = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(values_C)])
        ends = np.cumsum(self.count_E)
        return sums[ends] - sums[ends - self.count_E]


def sizes_of(dataset: TokenizedDataset, rows: Sequence[int]) -> list[ExampleSize]:
    """Sizes of some examples, from the data set's length columns; no token is read."""
    return [
        ExampleSize(
            int(dataset.prompt_lengths[row]),
            dataset.completion_lengths[row],
            dataset.pairs_of(row),
            float(dataset.weights[row]),
            dataset.learned_lengths[row] if dataset.preferences.num_given_tokens else None,
            dataset.ratings_of(row),
        )
        for row in rows
    ]


def longest_example(dataset: TokenizedDataset, share_prompt: bool) -> int:
    """The row with the most packed tokens."""
    return int(np.argmax(input_tokens_of(dataset, share_prompt)))


def input_tokens_of(dataset: TokenizedDataset, share_prompt: bool) -> Int64[np.ndarray, " N"]:
    """`ExampleSize.input_tokens` of every row."""
    flat, starts = dataset.completion_lengths.flat, dataset.completion_lengths.starts
    counts = np.diff(starts)
    copies = np.ones_like(counts) if share_prompt else counts
    return copies * dataset.prompt_lengths + np.add.reduceat(flat, starts[:-1]) - counts


def _seen(lengths: Int64[np.ndarray, " N"], window: int | None) -> Int64[np.ndarray, " N"]:
    """Sum over the first positions, as many as `lengths` says, of the keys that each sees."""
    near = lengths if window is None else np.minimum(lengths, window)
    return near * (near + 1) // 2 + (lengths - near) * near
