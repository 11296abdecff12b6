"""The comparison with recorded trajectories finds what it is there to find."""

import json
from pathlib import Path

import pytest

from tests.golden import trajectories
from tests.golden.trajectories import compare_parameters, compare_trajectory, load_case, load_rows

EVERY_NUMBER = [
    "loss",
    "grad_norm",
    "logps/chosen",
    "logps/rejected",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
]


def _lines(case: str = "sigmoid") -> list[dict[str, float]]:
    return [{**line, "step": step} for step, line in enumerate(load_case(case).logs, 1)]


@pytest.mark.parametrize("case", trajectories.CASES)
def test_a_recorded_run_equals_itself(case: str) -> None:
    assert compare_trajectory(_lines(case), load_case(case).logs) == []


@pytest.mark.parametrize("key", EVERY_NUMBER)
def test_a_number_that_is_off_is_named(key: str) -> None:
    lines = _lines()
    lines[4][key] *= 1 + 3e-4
    lines[4][key] += 1e-5
    (difference,) = compare_trajectory(lines, load_case("sigmoid").logs)
    assert difference.startswith(f"step 5: {key}=")


def test_one_pair_that_is_right_by_mistake_is_found() -> None:
    lines = _lines()
    lines[0]["rewards/accuracies"] += 0.25
    assert compare_trajectory(lines, load_case("sigmoid").logs)


def test_rounding_of_a_reward_near_zero_is_allowed() -> None:
    lines = _lines()
    lines[0]["rewards/chosen"] += 4e-6
    assert compare_trajectory(lines, load_case("sigmoid").logs) == []


def test_a_run_with_another_number_of_steps_is_not_equal() -> None:
    assert compare_trajectory(_lines()[:-1], load_case("sigmoid").logs)
    assert compare_trajectory([], load_case("sigmoid").logs)


def test_parameters_are_compared_by_name_and_norm() -> None:
    norms = dict(load_case("sigmoid").final_param_norms)
    # The trained norms differ from the untrained model's.
    assert compare_parameters(trajectories.FOLDER / "tiny_policy", norms)
    norms.pop("lm_head.weight")
    (difference,) = compare_parameters(trajectories.FOLDER / "tiny_policy", norms)
    assert "lm_head.weight" in difference


def test_lines_of_a_split_are_told_apart(tmp_path: Path) -> None:
    lines = [{"step": 0, "split": "evaluation"}, {"step": 1}, {"step": 1, "split": "evaluation"}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert trajectories.lines_of(tmp_path) == [{"step": 1}]
    assert [line["step"] for line in trajectories.lines_of(tmp_path, "evaluation")] == [0, 1]


def test_the_recorded_pairs_are_complete() -> None:
    rows = load_rows()
    assert len(rows) == 24
    assert all(row.chosen_ids != row.rejected_ids for row in rows)
