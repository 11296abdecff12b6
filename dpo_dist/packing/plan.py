"""A step's examples spread over ranks and micro-batches by cost.

Under ZeRO-3 every layer gather is collective: all ranks run the same number of micro-batches, side by side, and each
takes as long as the slowest rank's (`bins.py`). A rank that has nothing to do gets an empty one, of which `batch.py`
makes a filler.

The plan is pure arithmetic on lengths: every rank computes the whole plan, and no rank has to be asked.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from dpo_dist.errors import ConfigError
from dpo_dist.packing.bins import Bin, by_rank, merged, slots_of
from dpo_dist.packing.cost import TOKENS, CostModel
from dpo_dist.packing.sizes import ExampleSize, Lengths

LARGEST_COST = 2**30  # of a step's examples, in units that bins are compared in
Bins = tuple[tuple[int, ...], ...]  # examples (positions in the step) of each micro-batch of one rank


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
    rated_weight: float = 0.0  # sum of the weights of rated completions: the denominator of losses of one of them
    idle: float = 0.0  # share of the ranks' time in which one waits for another one's larger micro-batch

    def examples_of_rank(self, rank: int) -> tuple[int, ...]:
        """Positions (in `examples`) of the rank's share of the step, ascending."""
        return tuple(sorted(position for batch in self.micro_batches[rank] for position in batch))

    @property
    def weights(self) -> tuple[float, float, float, float]:
        """The denominators, in the order of `losses.UNITS`."""
        return self.pair_weight, self.token_weight, self.example_weight, self.rated_weight

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
    cost: CostModel = TOKENS

    def plan(self, step: int, examples: Sequence[int], sizes: Sequence[ExampleSize]) -> StepPlan:
        """Spread the examples of one step; `sizes[i]` belongs to `examples[i]`."""
        tokens: list[int] = Lengths.of(sizes).input_tokens(self.share_prompts).tolist()
        costs = _whole(self.cost.training(sizes, self.share_prompts))
        ranks = by_rank(slots_of(costs, tokens, self.world_size, self.max_tokens), costs)
        return StepPlan(
            step=step,
            examples=tuple(examples),
            micro_batches=_frozen(ranks),
            reference_bins=_frozen(_reference_bins(ranks, costs, tokens, self.reference_max_tokens)),
            pair_weight=math.fsum(size.pair_weight for size in sizes),
            token_weight=math.fsum(size.demonstrated_tokens for size in sizes),
            example_weight=math.fsum(size.weight for size in sizes),
            num_pairs=sum(len(size.pairs) for size in sizes),
            rated_weight=math.fsum(size.rated_weight for size in sizes),
            idle=_idle(ranks, costs),
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


def _idle(ranks: Sequence[Sequence[Bin]], costs: Sequence[int]) -> float:
    """1 minus the sum over slots of ranks' mean cost over that of their largest."""
    loads = [[sum(costs[item] for item in one) for one in bins] for bins in ranks]
    slots = list(zip(*loads, strict=True))
    longest = sum(map(max, slots))
    return 1.0 - sum(map(sum, slots)) / (len(ranks) * longest) if longest else 0.0


def _reference_bins(
    ranks: Sequence[Sequence[Bin]], costs: Sequence[int], tokens: Sequence[int], budget: int
) -> Sequence[Sequence[Bin]]:
    """The rank's examples again, in larger bins: whole micro-batches together, whose slots are even already.

    Where the budget is below a micro-batch, each rank packs its examples anew. A forward's costs have nearly the ratios
    of training's.
    """
    if (found := merged(ranks, tokens, budget)) is not None:
        return found
    anew = []
    for bins in ranks:
        mine = [item for one in bins for item in one]
        slots = slots_of([costs[item] for item in mine], [tokens[item] for item in mine], 1, budget)
        anew.append([[mine[place] for place in slot[0]] for slot in slots])
    num_slots = max(map(len, anew))
    return [bins + [[] for _ in range(num_slots - len(bins))] for bins in anew]


def _whole(costs: Float64[np.ndarray, " E"]) -> list[int]:
    """In whole numbers, of which no sum depends on an order."""
    return [] if not len(costs) else np.rint(costs * (LARGEST_COST / costs.max())).astype(np.int64).tolist()


def _frozen(ranks: Sequence[Sequence[Bin]]) -> tuple[Bins, ...]:
    return tuple(tuple(tuple(sorted(one)) for one in bins) for bins in ranks)
