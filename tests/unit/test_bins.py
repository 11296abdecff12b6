"""Items in bins that ranks run side by side: kept budgets, the sum over slots of the largest bin, and its bounds."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_dist.packing import slots_of, span
from dpo_dist.packing.bins import by_rank, merged

ITEMS = st.lists(st.tuples(st.integers(1, 50), st.integers(1, 40)), max_size=40)  # cost, tokens
RANKS = st.integers(1, 9)


def split(items: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    return [cost for cost, _ in items], [tokens for _, tokens in items]


def sums(bins: list[list[int]], numbers: list[int]) -> list[int]:
    return [sum(numbers[item] for item in one) for one in bins]


@given(items=ITEMS, ranks=RANKS, budget=st.integers(1, 120))
def test_every_item_once_and_no_bin_above_the_budget(items: list[tuple[int, int]], ranks: int, budget: int) -> None:
    costs, tokens = split(items)
    slots = slots_of(costs, tokens, ranks, budget)
    assert len(slots) >= 1
    assert all(len(slot) == ranks for slot in slots)
    bins = list(itertools.chain.from_iterable(slots))
    assert sorted(itertools.chain.from_iterable(bins)) == list(range(len(items)))
    for one in bins:
        assert sum(tokens[item] for item in one) <= budget or len(one) == 1
    largest = [max(sum(tokens[item] for item in one) for one in slot) for slot in slots]
    assert largest == sorted(largest, reverse=True)  # what does not fit into memory fails in the first step


@given(items=ITEMS, ranks=RANKS, budget=st.integers(1, 120))
def test_no_more_slots_than_best_fit_needs(items: list[tuple[int, int]], ranks: int, budget: int) -> None:
    costs, tokens = split(items)
    loads: list[int] = []
    for count in sorted((min(count, budget) for count in tokens), reverse=True):
        fitting = [place for place, load in enumerate(loads) if load + count <= budget]
        if fitting:
            loads[max(fitting, key=lambda place: loads[place])] += count
        else:
            loads.append(count)
    assert len(slots_of(costs, tokens, ranks, budget)) == max(1, -(-len(loads) // ranks))


@given(items=ITEMS, ranks=RANKS)
def test_one_slot_is_no_worse_than_longest_first_and_keeps_grahams_bound(
    items: list[tuple[int, int]], ranks: int
) -> None:
    costs, tokens = split(items)
    slots = slots_of(costs, tokens, ranks, 10**6)
    assert len(slots) == 1
    longest_first = [0] * ranks
    for cost in sorted(costs, reverse=True):
        longest_first[longest_first.index(min(longest_first))] += cost
    assert span(slots, costs) <= max(longest_first)
    assert ranks * span(slots, costs) <= sum(costs) + (ranks - 1) * max(costs, default=0)


@given(items=st.lists(st.integers(1, 30), min_size=1, max_size=8))
def test_two_ranks_against_all_ways_there_are(items: list[int]) -> None:
    costs = items
    best = min(
        max(sum(itertools.compress(costs, ways)), sum(costs) - sum(itertools.compress(costs, ways)))
        for ways in itertools.product((0, 1), repeat=len(costs))
    )
    # Graham 1969: 4/3 - 1/(3 m)
    assert best <= span(slots_of(costs, [1] * len(items), 2, 100), costs) <= 7 / 6 * best


@given(items=ITEMS, ranks=RANKS, budget=st.integers(1, 120))
def test_ranks_totals_differ_by_no_more_than_bins_of_a_slot(
    items: list[tuple[int, int]], ranks: int, budget: int
) -> None:
    costs, tokens = split(items)
    slots = slots_of(costs, tokens, ranks, budget)
    dealt = by_rank(slots, costs)
    for index, slot in enumerate(slots):
        assert sorted(map(sorted, slot)) == sorted(sorted(bins[index]) for bins in dealt)
    totals = [sum(sums(bins, costs)) for bins in dealt]
    ranges = [max(sums(slot, costs)) - min(sums(slot, costs)) for slot in slots]
    assert max(totals) - min(totals) <= max(ranges)


@given(items=ITEMS, ranks=RANKS, budget=st.integers(40, 120), times=st.integers(1, 4))
def test_whole_slots_are_put_together(items: list[tuple[int, int]], ranks: int, budget: int, times: int) -> None:
    costs, tokens = split(items)
    dealt = by_rank(slots_of(costs, tokens, ranks, budget), costs)
    together = merged(dealt, tokens, times * budget)
    assert together is not None
    assert len({len(bins) for bins in together}) == 1
    assert len(together[0]) <= len(dealt[0])
    for before, after in zip(dealt, together, strict=True):
        assert sorted(itertools.chain.from_iterable(before)) == sorted(itertools.chain.from_iterable(after))
        assert all(sum(tokens[item] for item in one) <= times * budget for one in after)


def test_bins_above_a_smaller_budget_are_not_put_together() -> None:
    assert merged([[[0, 1]]], [3, 3], 5) is None
    assert merged([[[0], [1]]], [3, 3], 5) == [[[0], [1]]]
    assert merged([[[0], [1]]], [3, 3], 6) == [[[0, 1]]]


def skewed(draw: random.Random, count: int) -> list[int]:
    """Lengths as of real preferences: many short ones, some eight times as long."""
    return [min(2048, int(draw.lognormvariate(5.5, 0.8)) + 8) for _ in range(count)]


@pytest.mark.parametrize(("ranks", "examples"), [(8, 256), (64, 1024)])
def test_slots_are_even(ranks: int, examples: int) -> None:
    draw, largest, mean = random.Random(0), 0.0, 0.0
    for _ in range(10):
        tokens = skewed(draw, examples)
        costs = [count * (8192 + count) for count in tokens]
        slots = slots_of(costs, tokens, ranks, 4096)
        largest += span(slots, costs)
        mean += sum(costs) / ranks
    assert largest <= 1.02 * mean


def test_few_examples_for_many_ranks_are_near_the_least_conceivable() -> None:
    draw, ratios = random.Random(0), []
    for _ in range(50):
        tokens = skewed(draw, 256)
        ratios.append(span(slots_of(tokens, tokens, 64, 8192), tokens) / max(sum(tokens) / 64, *tokens))
    assert sorted(ratios)[25] <= 1.01
    assert max(ratios) <= 1.03


def test_beside_a_long_item_others_are_heaped_up_and_the_next_slot_is_short() -> None:
    """Longest first over all bins gives 10 and 4 side by side, then 4 and 4: 14."""
    items = [10, 2, 2, 2, 2, 2, 2]
    slots = slots_of(items, items, 2, 10)
    assert [sorted(sums(slot, items)) for slot in slots] == [[10, 10], [0, 2]]


def test_costs_decide_and_not_tokens() -> None:
    """Equal lengths that cost differently: one long row costs more attention than two halves."""
    slots = slots_of([4, 1, 1, 1, 1], [10, 10, 10, 10, 10], 2, 100)
    assert sorted(map(sorted, slots[0])) == [[0], [1, 2, 3, 4]]


def test_an_item_above_the_budget_has_a_bin_of_its_own() -> None:
    slots = slots_of([50, 1, 1], [50, 1, 1], 1, 10)
    assert sorted(map(sorted, itertools.chain.from_iterable(slots))) == [[0], [1, 2]]


def test_nothing_is_one_slot_of_fillers() -> None:
    assert slots_of([], [], 3, 10) == [[[], [], []]]
    assert span([[[], []]], []) == 0


def test_equal_items_go_by_their_index() -> None:
    """Nothing but the numbers decides, so that ranks on different machines agree."""
    assert by_rank(slots_of([5] * 6, [1] * 6, 3, 10), [5] * 6) == [[[0, 3]], [[1, 4]], [[2, 5]]]


@pytest.mark.parametrize(("budget", "most"), [(4096, 1.01), (2048, 1.06)])
def test_a_tight_budget_costs_little(budget: int, most: float) -> None:
    """Micro-batches are 90 % full, and the longest example fills one of the smaller ones alone."""
    draw = random.Random(0)
    tokens = [min(2048, int(draw.lognormvariate(5.5, 0.8)) + 8) for _ in range(4096)]
    costs = [count * (8192 + count) for count in tokens]
    slots = slots_of(costs, tokens, 128, budget)
    assert sum(tokens) > 0.7 * 128 * budget * len(slots)
    assert span(slots, costs) <= most * sum(costs) / 128


def test_lengths_that_fit_in_one_way_only() -> None:
    """Costs pull the other way: what is as many slots as must be comes first."""
    slots = slots_of([1, 9, 9, 1], [6, 4, 6, 4], 2, 10)
    assert len(slots) == 1
    assert sorted(sums(slots[0], [6, 4, 6, 4])) == [10, 10]
