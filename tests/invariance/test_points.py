"""Every switch leaves the recorded trajectory as it is, and every switch acts."""

import math
from collections.abc import Callable

import pytest

from tests.golden.trajectories import compare_run, lines_of, load_rows
from tests.invariance.conftest import Outcome
from tests.invariance.points import FACTORS, FULL_PRODUCT, Point, all_pairs, covering_set, pairs_of

COVERING_SET = covering_set()
PARAMETERS = [
    pytest.param(point, id=point.name, marks=() if point in COVERING_SET else pytest.mark.slow)
    for point in FULL_PRODUCT
]
# The launch has a limit of its own, and the first test of a world size waits for all of its runs.
pytestmark = pytest.mark.timeout(0)


def test_the_covering_set_holds_every_pair_of_values() -> None:
    covered = set().union(*map(pairs_of, COVERING_SET))
    assert covered == all_pairs()
    assert len(all_pairs()) == sum(
        len(first) * len(second)
        for i, first in enumerate(FACTORS.values())
        for second in list(FACTORS.values())[i + 1 :]
    )
    assert len(FULL_PRODUCT) == math.prod(len(values) for values in FACTORS.values()) == 640
    assert len(COVERING_SET) <= 24
    assert covering_set() == COVERING_SET


@pytest.mark.parametrize("point", PARAMETERS)
def test_the_trajectory_is_the_recorded_one_and_the_switches_acted(
    point: Point, outcome_of: Callable[[str, int], Outcome]
) -> None:
    outcome = outcome_of(point.name, point.world_size)
    assert compare_run(outcome.output_dir, point.recorded) == []
    assert_tokens(point, outcome)
    assert_budgets(point, outcome)
    assert_recomputed(point, outcome)
    assert_partitioned(point, outcome)
    assert_shares(point, outcome)


def assert_tokens(point: Point, outcome: Outcome) -> None:
    """Prompts were run once or once per completion: what was written, and what went through each engine."""
    size = point.recorded.examples_per_step
    expected = [
        sum(row.input_tokens(point.sharing) for row in load_rows()[start : start + size])
        for start in range(0, size * point.recorded.steps, size)
    ]
    assert [line["tokens_processed"] for line in lines_of(outcome.output_dir)] == expected
    assert _tokens_of_steps(outcome, "micro_batches") == expected
    assert _tokens_of_steps(outcome, "reference_bins") == expected


def _tokens_of_steps(outcome: Outcome, key: str) -> list[int]:
    steps_of_ranks = zip(*(rank[key] for rank in outcome.ranks), strict=True)
    return [sum(sum(bins) for bins in ranks) for ranks in steps_of_ranks]


def assert_budgets(point: Point, outcome: Outcome) -> None:
    """A small budget is kept by more forwards, a large one is used by a single one; all ranks run equally many."""
    for key, is_small, budget in (
        ("micro_batches", point.small_batches, point.max_tokens),
        ("reference_bins", point.small_reference_bins, point.reference_max_tokens),
    ):
        counts = [[len(bins) for bins in rank[key]] for rank in outcome.ranks]
        assert all(other == counts[0] for other in counts)
        assert len(counts[0]) == point.recorded.steps
        if not is_small:
            assert set(counts[0]) == {1}
            continue
        needed = [
            max(math.ceil(sum(bins) / budget) for bins in ranks)
            for ranks in zip(*(rank[key] for rank in outcome.ranks), strict=True)
        ]
        assert sum(counts[0]) > point.recorded.steps
        assert all(count >= at_least for count, at_least in zip(counts[0], needed, strict=True))
        assert all(tokens <= budget for rank in outcome.ranks for bins in rank[key] for tokens in bins)
    for rank in outcome.ranks:
        assert rank["backward_calls"] == sum(len(bins) for bins in rank["micro_batches"])


def assert_recomputed(point: Point, outcome: Outcome) -> None:
    """With checkpointing every layer runs twice per micro-batch, without it once."""
    for rank in outcome.ranks:
        assert rank["num_layers"] == 2
        times = 2 if point.checkpointing else 1
        assert rank["attention_forwards"] == times * rank["num_layers"] * rank["backward_calls"]


def assert_partitioned(point: Point, outcome: Outcome) -> None:
    """Parameters at stage 3, gradients from stage 2, optimizer from stage 1; DeepSpeed pads shards to equal sizes."""
    for rank in outcome.ranks:
        whole, share = rank["whole_numel"], rank["whole_numel"] / point.world_size
        assert whole > 25_000
        assert rank["stage"] == point.stage
        held = share if point.stage == 3 else whole
        assert rank["policy_numel"] == pytest.approx(held, rel=0.01)
        assert rank["reference_numel"] == pytest.approx(held, rel=0.01)
        assert rank["gradients_partitioned"] == (point.stage >= 2)
        assert rank["optimizer_numel"] == pytest.approx(share if point.stage >= 1 else whole, rel=0.01)
    first = outcome.ranks[0]
    assert first["reference_after"] == first["reference_before"] != ""
    assert first["policy_after"] != first["policy_before"]


def assert_shares(point: Point, outcome: Outcome) -> None:
    """Every rank scored completions in every step, and each about its share of the tokens."""
    completions_of_steps = list(zip(*(rank["completions"] for rank in outcome.ranks), strict=True))
    assert all(sum(step) == 2 * point.recorded.examples_per_step for step in completions_of_steps)
    assert all(min(step) >= 2 for step in completions_of_steps)
    tokens = [sum(map(sum, rank["micro_batches"])) for rank in outcome.ranks]
    assert all(abs(own / sum(tokens) - 1 / point.world_size) < 0.1 for own in tokens)
