"""The plan of a step, as properties that hold for all lengths and world sizes."""

import itertools
import random
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_dist.data import Pair
from dpo_dist.errors import ConfigError
from dpo_dist.packing import (
    TOKENS,
    AttentionCost,
    CostModel,
    ExampleSize,
    Packer,
    StepPlan,
    longest_example,
    sizes_of,
)
from dpo_dist.tokenization import TokenizedDataset, TokenizedExample
from dpo_dist.tokenization.dataset import PreferenceCounts, RaggedLengths

LENGTHS = st.integers(1, 40)


RawSize = tuple[int, list[int], list[tuple[int, int, float]]]  # prompt, completions, (chosen, rejected, weight)
RAW_SIZES = st.tuples(
    LENGTHS,
    st.lists(LENGTHS, min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.sampled_from([0.5, 1.0, 3.0])), max_size=3),
)


def sizes_from(raw: list[RawSize]) -> list[ExampleSize]:
    """Made in the test, not in the strategy: type checks draw random numbers, which hypothesis forbids there."""
    return [
        ExampleSize(
            prompt,
            tuple(completions),
            tuple(Pair(chosen % len(completions), rejected % len(completions), w) for chosen, rejected, w in pairs),
        )
        for prompt, completions, pairs in raw
    ]


STEPS = {
    "raw": st.lists(RAW_SIZES, min_size=1, max_size=30),
    "world_size": st.integers(1, 16),
    "share": st.booleans(),
    "slack": st.integers(0, 300),
}


def packer_for(sizes: list[ExampleSize], world_size: int, share: bool, slack: int) -> Packer:
    """A packer under whose budget the longest example just fits, plus slack."""
    longest = max(size.input_tokens(share) for size in sizes)
    return Packer(world_size, longest + slack, longest + 2 * slack, share)


def plan_of(packer: Packer, sizes: list[ExampleSize]) -> StepPlan:
    return packer.plan(7, range(100, 100 + len(sizes)), sizes)


@given(**STEPS)
def test_every_example_once_within_the_budget_and_ranks_in_step(
    raw: list[RawSize], world_size: int, share: bool, slack: int
) -> None:
    sizes = sizes_from(raw)
    packer = packer_for(sizes, world_size, share, slack)
    plan = plan_of(packer, sizes)
    assert plan.examples == tuple(range(100, 100 + len(sizes)))
    budgets = {packer.max_tokens: plan.micro_batches, packer.reference_max_tokens: plan.reference_bins}
    for budget, bins_of_ranks in budgets.items():
        assert len(bins_of_ranks) == world_size
        assert len({len(bins) for bins in bins_of_ranks}) == 1  # ZeRO-3 gathers are collective
        assert len(bins_of_ranks[0]) >= 1
        placed = [position for bins in bins_of_ranks for one in bins for position in one]
        assert sorted(placed) == list(range(len(sizes)))
        for one in itertools.chain.from_iterable(bins_of_ranks):
            assert sum(sizes[position].input_tokens(share) for position in one) <= budget
    for rank in range(world_size):
        # The reference answers for the examples that the policy of the same rank will ask about.
        mine = sorted(itertools.chain.from_iterable(plan.micro_batches[rank]))
        assert mine == sorted(itertools.chain.from_iterable(plan.reference_bins[rank]))
        assert plan.examples_of_rank(rank) == tuple(mine)
    assert plan.pair_weight == pytest.approx(sum(pair.weight for size in sizes for pair in size.pairs))
    assert plan.num_pairs == sum(len(size.pairs) for size in sizes)


def test_a_budget_may_be_filled_and_not_exceeded_by_one_token() -> None:
    def num_bins(*tokens: int) -> list[int]:
        sizes = [ExampleSize(1, (count,), ()) for count in tokens]  # packed: 1 + count - 1 tokens
        plan = Packer(1, 10, 20, True).plan(0, range(len(sizes)), sizes)
        return [len(plan.micro_batches[0]), len(plan.reference_bins[0])]

    assert num_bins(6, 4) == num_bins(4, 3, 3) == [1, 1]
    assert num_bins(6, 5) == num_bins(4, 4, 3) == [2, 1]
    assert num_bins(10, 10, 1) == [3, 2]


def test_what_a_step_is_divided_by() -> None:
    compared = ExampleSize(4, (3, 5), (Pair(0, 1, 2.0), Pair(1, 0, 0.5)), weight=3.0)
    demonstrated = ExampleSize(2, (7,), (), weight=1.5)
    rated = ExampleSize(2, (6, 8), (), weight=0.5, ratings=(True, False))
    plan = Packer(1, 100, 100, True).plan(0, range(3), [compared, demonstrated, rated])
    assert plan.weights == (2.0 + 0.5, 2.0 * 3 + 0.5 * 5 + 1.5 * 7 + 0.5 * 6, 3.0 + 1.5 + 0.5, 2 * 0.5)


@given(**STEPS)
def test_depends_on_lengths_only(raw: list[RawSize], world_size: int, share: bool, slack: int) -> None:
    """Computed twice, by anybody, from lengths alone: it is equal; which rows they are does not matter."""
    sizes = sizes_from(raw)
    packer = packer_for(sizes, world_size, share, slack)
    plan = plan_of(packer, sizes)
    again = plan_of(replace(packer), [replace(size) for size in sizes])
    assert again == plan
    assert again.fingerprint == plan.fingerprint
    other_rows = packer.plan(7, range(len(sizes)), sizes)
    assert (other_rows.micro_batches, other_rows.reference_bins) == (plan.micro_batches, plan.reference_bins)
    assert other_rows.fingerprint != plan.fingerprint


@given(**STEPS)
def test_micro_batches_side_by_side_are_even(raw: list[RawSize], world_size: int, share: bool, slack: int) -> None:
    """Where a rank has one micro-batch, Graham's bound; ranks' sums differ by no more than one slot's micro-batches."""
    sizes = sizes_from(raw)
    tokens = [size.input_tokens(share) for size in sizes]
    plan = plan_of(packer_for(sizes, world_size, share, slack), sizes)
    slots = [[sum(tokens[i] for i in one) for one in slot] for slot in zip(*plan.micro_batches, strict=True)]
    if len(slots) == 1:
        assert world_size * max(slots[0]) <= sum(tokens) + (world_size - 1) * max(tokens)
    totals = [sum(tokens[i] for i in plan.examples_of_rank(rank)) for rank in range(world_size)]
    assert max(totals) - min(totals) <= max(max(slot) - min(slot) for slot in slots)


@pytest.mark.parametrize("slack", [0, 1000])
def test_ranks_wait_less_than_where_examples_are_dealt_out_in_order(slack: int) -> None:
    draw = random.Random(0)
    for _ in range(20):
        sizes = [ExampleSize(int(draw.lognormvariate(5, 1)) + 1, (9, 9), (Pair(0, 1),)) for _ in range(64)]
        tokens = [size.input_tokens(True) for size in sizes]
        plan = plan_of(packer_for(sizes, 8, True, slack), sizes)
        ours = sum(max(sum(tokens[i] for i in one) for one in slot) for slot in zip(*plan.micro_batches, strict=True))
        naive = max(sum(tokens[rank::8]) for rank in range(8))  # even if all of it were one micro-batch
        ideal = max(max(tokens), sum(tokens) / 8)
        assert ours < naive
        assert ours <= 1.05 * ideal


def test_costs_are_balanced_and_not_tokens() -> None:
    """A long example attends to more keys than two halves of it."""
    sizes = [ExampleSize(length, (1,), ()) for length in (40, 20, 20, 20)]
    quadratic = CostModel(per_token=0.0, attention=(AttentionCost(None, 1.0),))
    by_tokens, by_keys = (plan_of(Packer(2, 100, 100, True, cost), sizes) for cost in (TOKENS, quadratic))
    assert [len(by_tokens.examples_of_rank(rank)) for rank in range(2)] == [2, 2]
    assert [len(by_keys.examples_of_rank(rank)) for rank in range(2)] == [1, 3]


def test_the_reference_has_whole_slots_of_the_policy() -> None:
    sizes = [ExampleSize(length, (1,), ()) for length in (11, 11, 10, 10, 9, 8)]
    plan = plan_of(Packer(2, 15, 25, True), sizes)
    assert [len(bins) for bins in plan.micro_batches] == [3, 3]
    assert [len(bins) for bins in plan.reference_bins] == [2, 2]
    for policy, reference in zip(plan.micro_batches, plan.reference_bins, strict=True):
        assert all(any(set(one) <= set(larger) for larger in reference) for one in policy)


def test_the_largest_step_is_planned_in_a_hundredth_of_its_time() -> None:
    """512 ranks, 8192 examples: a step of tens of seconds. Seconds of the processor, five times what it takes."""
    draw = random.Random(0)
    sizes = [
        ExampleSize(int(draw.lognormvariate(4.5, 0.8)) + 1, (int(draw.lognormvariate(4, 0.8)) + 1, 60), (Pair(0, 1),))
        for _ in range(8192)
    ]
    packer = packer_for(sizes, 512, True, 500)
    started = time.process_time()
    plan = packer.plan(0, range(8192), sizes)
    assert time.process_time() - started < 1.0
    assert sum(len(plan.examples_of_rank(rank)) for rank in range(512)) == 8192


def test_uses_as_few_micro_batches_as_the_fullest_rank_needs_and_fills_them_evenly() -> None:
    sizes = [ExampleSize(11, (1, 1), (Pair(0, 1),)) for _ in range(8)]  # 11 tokens each
    plan = plan_of(Packer(2, max_tokens=30, reference_max_tokens=44, share_prompts=True), sizes)
    assert [[len(one) for one in bins] for bins in plan.micro_batches] == [[2, 2], [2, 2]]
    assert [[len(one) for one in bins] for bins in plan.reference_bins] == [[4], [4]]


def test_the_largest_micro_batch_comes_first() -> None:
    sizes = [ExampleSize(length, (1,), ()) for length in (3, 30, 12, 25, 8, 19, 2)]
    plan = plan_of(packer_for(sizes, 1, True, 5), sizes)
    loads = [sum(sizes[i].prompt for i in one) for one in plan.micro_batches[0]]
    assert len(loads) > 1
    assert loads == sorted(loads, reverse=True)


def test_a_rank_without_examples_gets_fillers() -> None:
    plan = plan_of(Packer(4, 10, 10, True), [ExampleSize(5, (2, 2), (Pair(0, 1),))] * 2)
    assert [len(plan.examples_of_rank(rank)) for rank in range(4)] == [1, 1, 0, 0]
    assert plan.micro_batches[3] == plan.reference_bins[3] == ((),)


def test_what_ranks_wait_for_each_other() -> None:
    """By hand: 7 and 4 tokens side by side; one rank alone; two of four ranks without an example."""
    sizes = [ExampleSize(length, (1,), ()) for length in (7, 4)]
    assert plan_of(Packer(2, 7, 7, True), sizes).idle == pytest.approx(1 - 11 / 14)
    assert plan_of(Packer(1, 7, 7, True), sizes).idle == 0.0
    assert plan_of(Packer(4, 10, 10, True), [ExampleSize(5, (2, 2), (Pair(0, 1),))] * 2).idle == pytest.approx(0.5)


# ---- one example


def test_tokens_of_an_example() -> None:
    size = ExampleSize(10, (4, 1, 6), (Pair(0, 1, 2.0), Pair(2, 0, 0.5)))
    assert size.input_tokens(share_prompt=True) == 10 + 3 + 0 + 5  # the last token of a completion is never an input
    assert size.input_tokens(share_prompt=False) == 30 + 3 + 0 + 5
    assert size.pair_weight == 2.5
    assert size.longest_rows == [14, 16]


def test_an_example_that_exceeds_the_budget_is_refused() -> None:
    size = ExampleSize(10, (4, 6), ())
    Packer(1, 18, 18, share_prompts=True).require_fit(size, "d.jsonl:3")
    Packer(1, 28, 28, share_prompts=False).require_fit(size, "d.jsonl:3")
    expected = (
        r"packing.max_tokens=17 is smaller than an example of 18 packed tokens \(d.jsonl:3\); raise it to at least 18"
    )
    with pytest.raises(ConfigError, match=expected):
        Packer(1, 17, 18, share_prompts=True).require_fit(size, "d.jsonl:3")
    with pytest.raises(ConfigError, match=r"packing\.reference_max_tokens=17"):
        Packer(1, 18, 17, share_prompts=True).require_fit(size, "d.jsonl:3")


# ---- from a data set's length columns


class Lengths(TokenizedDataset):
    """The part of a tokenised data set that the packer reads, without a file."""

    def __init__(self, sizes: list[ExampleSize]) -> None:
        self.prompt_lengths = np.array([size.prompt for size in sizes])
        self.completion_lengths = RaggedLengths(
            flat=np.array([length for size in sizes for length in size.completions]),
            starts=np.cumsum([0, *(len(size.completions) for size in sizes)]),
        )
        self.weights = np.array([size.weight for size in sizes])
        self.preferences = PreferenceCounts()
        self._sizes = sizes

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, index: int) -> TokenizedExample:  # pyright: ignore[reportIncompatibleMethodOverride]
        size = self._sizes[index]
        return TokenizedExample((0,) * size.prompt, tuple((0,) * n for n in size.completions), size.pairs, "")

    def pairs_of(self, index: int) -> tuple[Pair, ...]:
        return self._sizes[index].pairs

    def ratings_of(self, index: int) -> tuple[bool, ...]:
        return self._sizes[index].ratings


@given(raw=STEPS["raw"], share=st.booleans())
def test_longest_example_is_the_one_with_most_packed_tokens(raw: list[RawSize], share: bool) -> None:
    sizes = sizes_from(raw)
    tokens = [size.input_tokens(share) for size in sizes]
    assert tokens[longest_example(Lengths(sizes), share)] == max(tokens)
    assert sizes_of(Lengths(sizes), range(len(sizes))[::-1]) == sizes[::-1]
