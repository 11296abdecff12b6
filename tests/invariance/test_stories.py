"""World size changes nothing: evaluation, shuffled epochs with a shorter last step, ranks without work; and the
reference stays what it was."""

import math
from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.golden.plain import completion_logp
from tests.golden.trajectories import FOLDER, Row, compare_trajectory, lines_of, load_case, load_rows
from tests.invariance.conftest import Outcome
from tests.invariance.stories import (
    EPOCH_EXAMPLES_PER_STEP,
    EPOCHS,
    EVALUATION_ROWS,
    EVALUATION_STEPS,
    FROZEN_STEPS,
    SINGLE_EXAMPLE_STEPS,
    STAGES_OF_FROZEN,
    STAGES_OF_SINGLE,
    evaluation_rows,
)

pytestmark = pytest.mark.timeout(0)
OutcomeOf = Callable[[str, int], Outcome]
WORLD_SIZES = (1, 2)
# Counted, not computed: equal to the last digit at any world size.
EXACT = ("step", "epoch", "learning_rate", "num_tokens", "tokens_processed", "tokens_unshared", "tokens_padded")


def _train_lines(outcome_of: OutcomeOf, name: str) -> list[list[dict]]:
    return [lines_of(outcome_of(name, world_size).output_dir) for world_size in WORLD_SIZES]


def _assert_same_run(outcome_of: OutcomeOf, name: str) -> list[dict]:
    one, two = _train_lines(outcome_of, name)
    assert compare_trajectory(two, one) == []
    assert [[line[key] for key in EXACT] for line in two] == [[line[key] for key in EXACT] for line in one]
    return one


# ---- evaluation


def _plain_means(rows: tuple[Row, ...], beta: float) -> dict[str, float]:
    """Metrics of the untrained policy, by plain transformers, one sequence at a time."""
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(FOLDER / name, dtype=torch.float64).eval()
        for name in ("tiny_policy", "tiny_reference")
    )
    sums: defaultdict[str, float] = defaultdict(float)
    for row in rows:
        rewards = {}
        for kind, ids in (("chosen", row.chosen_ids), ("rejected", row.rejected_ids)):
            logp = completion_logp(policy, row.prompt_ids, ids)
            rewards[kind] = beta * (logp - completion_logp(reference, row.prompt_ids, ids))
            sums[f"logps/{kind}"] += logp
            sums[f"rewards/{kind}"] += rewards[kind]
        sums["loss"] += math.log1p(math.exp(rewards["rejected"] - rewards["chosen"]))
    return {name: value / len(rows) for name, value in sums.items()}


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("dataset", EVALUATION_ROWS)
def test_evaluation_counts_every_row_once(dataset: str, world_size: int, outcome_of: OutcomeOf) -> None:
    lines = lines_of(outcome_of("evaluation", world_size).output_dir, "evaluation")
    mine = [line for line in lines if line["dataset"] == dataset]
    assert len(lines) == len(EVALUATION_ROWS) * len(EVALUATION_STEPS)
    assert tuple(line["step"] for line in mine) == EVALUATION_STEPS
    rows = evaluation_rows(dataset)
    for line in mine:
        assert line["num_pairs"] == len(rows)
        assert line["tokens_processed"] == sum(row.input_tokens(share_prompt=True) for row in rows)
    # Every row differs from every other, so a row counted twice, or not at all, would change a mean.
    for name, value in _plain_means(rows, beta=0.1).items():
        assert mine[0][name] == pytest.approx(value, rel=1e-5, abs=5e-6), name
    assert mine[1]["loss"] != mine[0]["loss"]


def test_evaluation_is_the_same_at_every_world_size(outcome_of: OutcomeOf) -> None:
    one, two = (lines_of(outcome_of("evaluation", size).output_dir, "evaluation") for size in WORLD_SIZES)
    assert len(one) == len(two)
    for alone, together in zip(one, two, strict=True):
        assert alone.keys() == together.keys()
        for key, value in alone.items():
            expected = pytest.approx(value, rel=1e-4, abs=5e-6) if isinstance(value, float) else value
            assert together[key] == expected, key


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_evaluation_between_steps_leaves_the_training_as_it_is(world_size: int, outcome_of: OutcomeOf) -> None:
    lines = lines_of(outcome_of("evaluation", world_size).output_dir)
    assert compare_trajectory(lines, load_case("sigmoid").logs[:3]) == []


# ---- epochs


def test_an_epoch_ends_with_a_shorter_step_and_drops_nothing(outcome_of: OutcomeOf) -> None:
    lines = _assert_same_run(outcome_of, "epoch")
    rows = load_rows()
    steps = math.ceil(len(rows) / EPOCH_EXAMPLES_PER_STEP)
    assert [line["step"] for line in lines] == list(range(1, EPOCHS * steps + 1))
    epochs = [lines[start : start + steps] for start in range(0, len(lines), steps)]
    for number, epoch in enumerate(epochs, 1):
        assert sum(line["tokens_processed"] for line in epoch) == sum(row.input_tokens(True) for row in rows)
        assert epoch[-1]["epoch"] == number
        last = outcome_of("epoch", 2).ranks
        in_last_step = sum(rank["completions"][number * steps - 1] for rank in last)
        assert in_last_step == 2 * (len(rows) % EPOCH_EXAMPLES_PER_STEP)
    # Shuffled anew: the second epoch's steps hold other rows.
    first, second = ([line["tokens_processed"] for line in epoch] for epoch in epochs)
    assert first != second


# ---- ranks without work


@pytest.mark.parametrize("stage", STAGES_OF_SINGLE)
def test_a_rank_without_work_changes_nothing(stage: int, outcome_of: OutcomeOf) -> None:
    name = f"single-stage{stage}"
    lines = _assert_same_run(outcome_of, name)
    rows = load_rows()[:SINGLE_EXAMPLE_STEPS]
    assert [line["tokens_processed"] for line in lines] == [row.input_tokens(share_prompt=True) for row in rows]
    # One of the two ranks ran nothing but fillers: as many of them as the other rank ran micro-batches.
    busy, idle = sorted((rank["micro_batches"] for rank in outcome_of(name, 2).ranks), reverse=True)
    assert [[tokens > 0 for tokens in step] for step in busy] == [[True]] * SINGLE_EXAMPLE_STEPS
    assert idle == [[0]] * SINGLE_EXAMPLE_STEPS


def test_a_rank_without_work_does_the_same_at_every_stage(outcome_of: OutcomeOf) -> None:
    _, first, *others = (lines_of(outcome_of(f"single-stage{stage}", 2).output_dir) for stage in (0, *STAGES_OF_SINGLE))
    assert all(compare_trajectory(other, first) == [] for other in others)


# ---- the reference


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("stage", STAGES_OF_FROZEN)
def test_the_reference_stays_what_it_was(stage: int, world_size: int, outcome_of: OutcomeOf) -> None:
    outcome = outcome_of(f"frozen-stage{stage}", world_size)
    seen = outcome.ranks[0]
    assert seen["reference_before"] == seen["policy_before"]  # loaded from one folder, bit for bit
    assert seen["reference_after"] == seen["reference_before"]
    assert seen["policy_after"] != seen["policy_before"]
    lines = lines_of(outcome.output_dir)
    assert len(lines) == FROZEN_STEPS
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert lines[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    for line in lines[1:]:
        assert abs(line["rewards/chosen"]) > 1e-3
        assert abs(line["rewards/rejected"]) > 1e-3


def test_the_far_policy_is_the_same_at_every_stage_and_world_size(outcome_of: OutcomeOf) -> None:
    runs = [lines_of(outcome_of(f"frozen-stage{s}", w).output_dir) for s in STAGES_OF_FROZEN for w in WORLD_SIZES]
    for lines in runs[1:]:
        for line, first in zip(lines, runs[0], strict=True):
            assert line["loss"] == pytest.approx(first["loss"], rel=1e-4)
            assert line["rewards/margins"] == pytest.approx(first["rewards/margins"], rel=1e-3, abs=1e-5)
