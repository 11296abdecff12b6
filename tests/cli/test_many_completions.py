"""What `check` shows of rankings and demonstrations, and that rows of one prompt may be merged without a trace in the
loss."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dpo_dist.cli import app
from tests.cli.test_mistakes import config
from tests.golden.trajectories import lines_of

__all__ = ["config"]


def written(folder: Path, *rows: dict[str, Any]) -> None:
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return result.output


def test_check_shows_completions_in_the_order_of_preference(config: Path) -> None:
    completions = [[8, 2], [9, 10, 2], [11, 2], [12, 2], [13, 2]]
    written(config, {"prompt_ids": [5, 6], "completions_ids": completions, "scores": [1, 3, 2, 5, 4]})
    shown = [line for line in run("check", "run.yaml").splitlines() if line.startswith("completion better than")]
    assert shown == [
        "completion better than 4 others (2 tokens): '12 2'",
        "completion better than 3 others (2 tokens): '13 2'",
        "completion better than 2 others (3 tokens): '9 10 2'",
        "completion better than 1 other (2 tokens): '11 2'",
    ]


def test_check_shows_a_demonstration(config: Path) -> None:
    written(config, {"prompt_ids": [5, 6], "completion_ids": [8, 9, 2]})
    output = run("check", "run.yaml", "loss.loss_type=sft")
    assert "completion (3 tokens): '8 9 2'" in output
    assert "first step on 1 rank: 1 example\n" in output
    assert "4 tokens processed; every demonstration on its own 5\n" in output


def test_merged_rows_give_the_same_loss_for_fewer_tokens(config: Path) -> None:
    ends = [([8, 2], [9, 2]), ([8, 2], [10, 11, 2]), ([10, 11, 2], [9, 2])]
    rows = [{"prompt_ids": [5, 6, 7], "chosen_ids": chosen, "rejected_ids": rejected} for chosen, rejected in ends]
    written(config, *rows, {**rows[0], "prompt_ids": [20, 21], "weight": 2.0})
    common = ["train.examples_per_step=4", "train.learning_rate=1e-2", "log.report_to=[]"]
    for grouped in ("true", "false"):
        run("train", "run.yaml", *common, f"data.group_by_prompt={grouped}", f"train.output_dir=merged-{grouped}")
    merged, apart = lines_of(config / "merged-true"), lines_of(config / "merged-false")
    assert len(merged) == len(apart) == 2
    for one, other in zip(merged, apart, strict=True):
        for key in ("loss", "grad_norm", "rewards/margins", "logps/chosen", "rewards/accuracies"):
            assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6), key
        assert one["tokens_processed"] < other["tokens_processed"]
        assert one["tokens_unshared"] == other["tokens_unshared"]
    assert merged[1]["loss"] != merged[0]["loss"]
