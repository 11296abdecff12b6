"""A step's examples spread over ranks and micro-batches by cost.

Longest-processing-time first: the next-largest example goes to the least loaded rank, then, inside a rank, to the least
loaded micro-batch. Under ZeRO-3 every layer gather is collective, so all ranks run the same number of micro-batches; a
rank that has fewer gets empty ones, which `batch.py` turns into fillers.

The plan is pure arithmetic on lengths: every rank computes the whole plan, and no rank has to be asked.
"""

import hashlib
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dpo_dist.data import Pair
from dpo_dist.errors import ConfigError
from dpo_dist.tokenization import TokenizedDataset

Bins = tuple[tuple[int, ...], ...]  # examples (positions in the step) of each micro-batch of one rank


@dataclass(frozen=True)
class ExampleSize:
    """What the packer has to know of one example."""

    prompt: int  # tokens
    completions: tuple[int, ...]  # tokens of each completion
    pairs: tuple[Pair, ...]
    weight: float = 1.0

    @property
    def pair_weight(self) -> float:
        """Sum of the weights of its pairs."""
        return math.fsum(pair.weight for pair in self.pairs)

    @property
    def demonstrated_tokens(self) -> float:
        """Tokens of the chosen completions, each times the weight of the pairs that it is chosen in.

        Without pairs every completion is a demonstration, and has the example's weight.
        """
        if not self.pairs:
            return self.weight * sum(self.completions)
        return math.fsum(pair.weight * self.completions[pair.chosen] for pair in self.pairs)

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
class StepPlan:
    """Who computes what in one global step; the same on every rank."""

    step: int
    examples: tuple[int, ...]  # rows of the data set, in the sampler's order
    micro_batches: tuple[Bins, ...]  # [rank][micro-batch]: positions in `examples`; () is a filler
    reference_bins: tuple[Bins, ...]  # the same for the reference, under its own token budget
    pair_weight: float  # sum of pair weights over all ranks: the denominator of losses of a pair
    token_weight: float  # the same of `demonstrated_tokens`: the denominator of losses of a token
    example_weight: float  # the same of examples: the denominator of losses of a whole list
    num_pairs: int

    def examples_of_rank(self, rank: int) -> tuple[int, ...]:
        """Positions (in `examples`) of the rank's share of the step, ascending."""
        return tuple(sorted(position for batch in self.micro_batches[rank] for position in batch))

    @property
    def weights(self) -> tuple[float, float, float]:
        """The denominators, in the order of `losses.UNITS`."""
        return self.pair_weight, self.token_weight, self.example_weight

    @property
    def fingerprint(self) -> str:
        """Equal on two ranks exactly when they would compute the same step."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Packer:
    """Plans steps for a fixed number of ranks and fixed token budgets."""

    world_size: int
    max_tokens: int  # per micro-batch of the policy
    reference_max_tokens: int  # per bin of the reference, which keeps no activations
    share_prompts: bool

    def plan(self, step: int, examples: Sequence[int], sizes: Sequence[ExampleSize]) -> StepPlan:
        """Spread the examples of one step; `sizes[i]` belongs to `examples[i]`."""
        tokens = [size.input_tokens(self.share_prompts) for size in sizes]
        shares = _balance(range(len(tokens)), tokens, self.world_size)
        return StepPlan(
            step=step,
            examples=tuple(examples),
            micro_batches=_bins_of_ranks(shares, tokens, self.max_tokens),
            reference_bins=_bins_of_ranks(shares, tokens, self.reference_max_tokens),
            pair_weight=math.fsum(size.pair_weight for size in sizes),
            token_weight=math.fsum(size.demonstrated_tokens for size in sizes),
            example_weight=math.fsum(size.weight for size in sizes),
            num_pairs=sum(len(size.pairs) for size in sizes),
        )

    def require_fit(self, size: ExampleSize, source: str) -> None:
        """An example is never split: one that alone exceeds the budget is refused before training.

        Raises:
            ConfigError: naming the row and its length.
        """
        tokens = size.input_tokens(self.share_prompts)
        for key, budget in (("max_tokens", self.max_tokens), ("reference_max_tokens", self.reference_max_tokens)):
            if tokens > budget:
                raise ConfigError(
                    f"packing.{key}={budget} is smaller than an example of {tokens} packed tokens ({source}); "
                    f"raise it to at least {tokens}, or set data.max_length and data.truncation_mode"
                )


def sizes_of(dataset: TokenizedDataset, rows: Sequence[int]) -> list[ExampleSize]:
    """Sizes of some examples, from the data set's length columns; no token is read."""
    return [
        ExampleSize(
            int(dataset.prompt_lengths[row]),
            dataset.completion_lengths[row],
            dataset.pairs_of(row),
            float(dataset.weights[row]),
        )
        for row in rows
    ]


def longest_example(dataset: TokenizedDataset, share_prompt: bool) -> int:
    """The row with the most packed tokens."""
    return int(np.argmax(input_tokens_of(dataset, share_prompt)))


def input_tokens_of(dataset: TokenizedDataset, share_prompt: bool) -> np.ndarray:
    """`ExampleSize.input_tokens` of every row."""
    flat, starts = dataset.completion_lengths.flat, dataset.completion_lengths.starts
    counts = np.diff(starts)
    copies = np.ones_like(counts) if share_prompt else counts
    return copies * dataset.prompt_lengths + np.add.reduceat(flat, starts[:-1]) - counts


def _bins_of_ranks(shares: Sequence[Sequence[int]], tokens: Sequence[int], budget: int) -> tuple[Bins, ...]:
    first_fit = [_first_fit(share, tokens, budget) for share in shares]
    num_bins = max(1, *(len(bins) for bins in first_fit))
    ranks = []
    for share, fitted in zip(shares, first_fit, strict=True):
        bins = _balance(share, tokens, num_bins)
        if any(sum(tokens[i] for i in one) > budget for one in bins):
            bins = fitted + [[] for _ in range(num_bins - len(fitted))]
        # The largest first: what does not fit into memory fails in the first step, not after an hour.
        bins = sorted(bins, key=lambda one: -sum(tokens[i] for i in one))
        ranks.append(tuple(tuple(sorted(one)) for one in bins))
    return tuple(ranks)


def _balance(items: Sequence[int], cost: Sequence[int], num_bins: int) -> list[list[int]]:
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    loads = [(0, index) for index in range(num_bins)]  # a heap: the least loaded bin, the first among equals
    for item in _descending(items, cost):
        load, lightest = loads[0]
        bins[lightest].append(item)
        heapq.heapreplace(loads, (load + cost[item], lightest))
    return bins


def _first_fit(items: Sequence[int], cost: Sequence[int], budget: int) -> list[list[int]]:
    bins: list[list[int]] = []
    loads: list[int] = []
    for item in _descending(items, cost):
        place = next((i for i, load in enumerate(loads) if load + cost[item] <= budget), None)
        if place is None:
            bins.append([item])
            loads.append(cost[item])
        else:
            bins[place].append(item)
            loads[place] += cost[item]
    return bins


def _descending(items: Sequence[int], cost: Sequence[int]) -> list[int]:
    return sorted(items, key=lambda item: (-cost[item], item))
