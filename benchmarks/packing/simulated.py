"""Steps that are planned, and what they would take.

Under ZeRO-3 a step takes the sum over slots (the k-th micro-batches of all ranks) of the largest micro-batch's cost.
Costs are the packer's own model; what a plan takes is added up here anew.

slots         micro-batches of a rank
over mean     sum over slots of the largest, over the same sum of means, fillers counted; all steps together
over bound    of single steps, median and p99: the same sum over the least conceivable, which is the mean load of a
              rank, or the largest example where that is more
reference     as "over mean", of the reference's forward in its own bins
dealt out     as "over mean", of what is common elsewhere: examples to ranks in turn, in the order of the sampler, and
              micro-batches filled in that order up to the same number of tokens
plan          milliseconds of a process for one step, the median; every rank plans
"""

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, count, islice

from dpo_dist.packing import ExampleSize, Packer
from dpo_dist.sampler import Sampler

HEADER = (
    "| ranks | examples | slots | over mean | over bound, median | p99 | reference | dealt out | plan, ms |\n"
    "|---|---|---|---|---|---|---|---|---|"
)
Slots = Sequence[Sequence[Sequence[int]]]  # [slot][rank]: examples


@dataclass(frozen=True)
class Simulated:
    """What steps of one shape came to."""

    ranks: int
    examples: int
    slots: float
    over_mean: float
    over_bound: tuple[float, ...]  # of every step
    reference_over_mean: float
    dealt_out_over_mean: float
    seconds: tuple[float, ...]  # of every plan

    @property
    def row(self) -> str:
        """One line of the table."""
        p99 = sorted(self.over_bound)[math.ceil(0.99 * len(self.over_bound)) - 1]
        return (
            f"| {self.ranks} | {self.examples} | {self.slots:.1f} | {self.over_mean:.4f} "
            f"| {statistics.median(self.over_bound):.4f} | {p99:.4f} | {self.reference_over_mean:.4f} "
            f"| {self.dealt_out_over_mean:.2f} | {1000 * statistics.median(self.seconds):.1f} |"
        )


def simulate(packer: Packer, sizes: Sequence[ExampleSize], steps: Sequence[Sequence[int]]) -> Simulated:
    """Plan every step.

    Args:
        packer: for a number of ranks.
        sizes: of every row of the data set.
        steps: rows of the data set; as many in each.
    """
    ranks = packer.world_size
    taken, loads, forward, forward_loads, dealt, over_bound, seconds, slots = 0.0, 0.0, 0.0, 0.0, 0.0, [], [], []
    for number, rows in enumerate(steps):
        mine = [sizes[row] for row in rows]
        started = time.process_time()
        plan = packer.plan(number, rows, mine)
        seconds.append(time.process_time() - started)
        costs = packer.cost.training(mine, packer.share_prompts).tolist()
        tokens = [size.input_tokens(packer.share_prompts) for size in mine]
        step, load = span(list(zip(*plan.micro_batches, strict=True)), costs), math.fsum(costs) / ranks
        taken, loads = taken + step, loads + load
        over_bound.append(step / max(load, *costs))
        slots.append(len(plan.micro_batches[0]))
        dealt += span(dealt_out(tokens, ranks, packer.max_tokens), costs)
        costs = packer.cost.forward(mine, packer.share_prompts).tolist()
        forward += span(list(zip(*plan.reference_bins, strict=True)), costs)
        forward_loads += math.fsum(costs) / ranks
    return Simulated(
        ranks, len(steps[0]), statistics.mean(slots), taken / loads, tuple(over_bound), forward / forward_loads,
        dealt / loads, tuple(seconds),
    )  # fmt: skip


def steps_of(num_rows: int, examples: int, num_steps: int, seed: int) -> list[list[int]]:
    """Rows in the order of a run's sampler, epoch after epoch; a step may be larger than the data."""
    sampler = Sampler(num_rows, num_rows, seed, shuffle=True)
    rows = chain.from_iterable(map(sampler.examples_of, count()))
    return [list(islice(rows, examples)) for _ in range(num_steps)]


def span(slots: Slots, costs: Sequence[float]) -> float:
    """Sum over slots of the cost of the slot's largest micro-batch."""
    return math.fsum(max(math.fsum(costs[item] for item in one) for one in slot) for slot in slots)


def dealt_out(tokens: Sequence[int], ranks: int, budget: int) -> Slots:
    """Examples to ranks in turn, and micro-batches filled in that order."""
    bins: list[list[list[int]]] = [[[]] for _ in range(ranks)]
    held = [0] * ranks
    for item, length in enumerate(tokens):
        rank = item % ranks
        if bins[rank][-1] and held[rank] + length > budget:
            bins[rank].append([])
            held[rank] = 0
        bins[rank][-1].append(item)
        held[rank] += length
    slots = max(map(len, bins))
    return [[own[slot] if slot < len(own) else [] for own in bins] for slot in range(slots)]
