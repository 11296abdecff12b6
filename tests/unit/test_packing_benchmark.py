"""The arithmetic of benchmarks/packing, on steps that can be added up by hand; and the command."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks.packing.simulated import HEADER, Simulated, dealt_out, simulate, span, steps_of
from dpo_dist.packing import ExampleSize, Packer
from tests.launching import REPOSITORY, environment


def test_a_step_takes_the_largest_of_every_slot() -> None:
    costs = [5.0, 3.0, 2.0, 7.0]
    assert span([[[0], [1, 2]], [[3], []]], costs) == 5.0 + 7.0
    assert span([[[0, 1], [2]], [[], [3]]], costs) == 8.0 + 7.0


def test_dealt_out_in_turn_and_filled_in_order() -> None:
    assert dealt_out([4, 1, 4, 1, 4, 1], 2, 8) == [[[0, 2], [1, 3, 5]], [[4], []]]
    assert dealt_out([20, 1], 1, 8) == [[[0]], [[1]]]


def test_a_step_that_is_added_up_by_hand() -> None:
    """Costs are tokens: 6 3 6 3 3 3 in bins of at most 10 for two ranks, hence two slots."""
    sizes = [ExampleSize(length, (1,), ()) for length in (6, 3, 6, 3, 3, 3)]
    steps = [[0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 0]]
    found = simulate(Packer(2, 10, 20, True), sizes, steps)
    assert (found.ranks, found.examples) == (2, 6)
    # The first step is even (12 on each rank); six examples of 6 tokens are one to a bin, in three slots of 6.
    assert found.slots == pytest.approx((2 + 3) / 2)
    assert found.over_bound == pytest.approx((12 / 12, 18 / 18))
    assert found.over_mean == pytest.approx(30 / 30)
    # Dealt out: 6 | 6 3 on one rank and 3 3 3 on the other, hence 9 + 9; then 6, 6 and 6.
    assert found.dealt_out_over_mean == pytest.approx((18 + 18) / 30)
    assert found.reference_over_mean == pytest.approx(1.0)


def test_fillers_count() -> None:
    found = simulate(Packer(3, 10, 20, True), [ExampleSize(6, (1,), ())], [[0, 0]])
    assert found.over_mean == pytest.approx(6 / 4)
    assert found.over_bound == pytest.approx((1.0,))  # no less is conceivable than the largest example


def test_a_row_has_the_columns_of_the_head() -> None:
    bound = tuple(1.0 + k / 1000 for k in range(200))
    row = Simulated(64, 1024, 2.0, 1.0123, bound, 1.01, 1.5, (0.004, 0.002, 0.003)).row
    assert row == "| 64 | 1024 | 2.0 | 1.0123 | 1.0995 | 1.1970 | 1.0100 | 1.50 | 3.0 |"
    assert row.count("|") == HEADER.splitlines()[0].count("|")


def test_steps_go_on_over_epochs() -> None:
    steps = steps_of(num_rows=5, examples=4, num_steps=5, seed=1)
    rows = [row for step in steps for row in step]
    assert [len(step) for step in steps] == [4] * 5
    assert all(sorted(rows[start : start + 5]) == list(range(5)) for start in range(0, 20, 5))
    assert [sorted(step) for step in steps_of(2, 6, 1, 1)] == [[0, 0, 0, 1, 1, 1]]


def test_the_command_prints_a_table_of_a_users_run(tmp_path: Path) -> None:
    pair = {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9, 2], "rejected_ids": [10, 2]}
    (tmp_path / "pairs.jsonl").write_text((json.dumps(pair) + "\n") * 3, encoding="utf-8")
    values = {
        "model": {"model_name_or_path": str(REPOSITORY / "tests" / "golden" / "tiny_policy"), "dtype": "float32"},
        "data": {"train": [{"path": str(tmp_path / "pairs.jsonl")}]},
        "train": {"output_dir": str(tmp_path / "out"), "examples_per_step": 2, "max_steps": 2},
        "parallel": {"deepspeed": "zero0_cpu"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks.packing", "run.yaml", "packing.max_tokens=500", "--shape", "4x8"]
    settings = environment({"DPO_DIST_CACHE": str(tmp_path / "cache")})
    done = subprocess.run(
        [*command, "--steps", "3"], cwd=tmp_path, env=settings, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "3 examples of 6 to 6 packed tokens, mean 6; micro-batches of 500 tokens, of the ref" in done.stdout
    assert HEADER in done.stdout
    # Eight equal examples on four ranks: nothing better is conceivable, and dealing out is as good.
    assert done.stdout.splitlines()[-1].startswith("| 4 | 8 | 1.0 | 1.0000 | 1.0000 | 1.0000 | 1.0000 | 1.00 | ")
    assert not (tmp_path / "out").exists()
