"""What a user gets wrong about losses and the data they read: exit code 2 with the reason, in `train` and `check`."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_mistakes import config, refuse

__all__ = ["config"]

COMMANDS = ("train", "check")
RANKED = {"prompt_ids": [5, 6], "completions_ids": [[8, 2], [9, 2], [10, 11, 2]], "scores": [1, 2, 3]}
PAIR = {"prompt_ids": [5, 6], "chosen_ids": [8, 2], "rejected_ids": [9, 2]}
DEMONSTRATION = {"prompt_ids": [5, 6], "completion_ids": [8, 2]}


def written(folder: Path, *rows: dict[str, Any]) -> None:
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"scores": [1, 2]}, "pairs.jsonl:2: scores has 2 values for 3 completions"),
        ({"scores": [1, float("nan"), 3]}, "pairs.jsonl:2: scores[1]=nan is not finite"),
        ({"scores": None, "ranks": [1, 3, 4]}, "pairs.jsonl:2: ranks=[1, 3, 4] is not a ranking"),
        ({"scores": None, "ranks": [1, 2]}, "pairs.jsonl:2: ranks has 2 values for 3 completions"),
    ],
)
def test_rankings(config: Path, command: str, changes: dict[str, Any], error: str) -> None:
    written(config, RANKED, {**RANKED, **changes})
    assert error in refuse(config, command=command)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("override", "error"),
    [
        ("loss.discopop_tau=0.1", "loss.discopop_tau=0.1 has no effect with loss.loss_type=sigmoid"),
        ("loss.loss_type=exo_pair", "needs loss.label_smoothing above 0"),
        ("loss.odpo_alpha=1", "loss.odpo_alpha=1 has no effect: no row of data.train has a margin"),
        ("data.pairing=list", "data.pairing=list is for loss.loss_type=plackett_luce"),
        ("health.max_accuracy_gap=0.5 health.action=stop", "has no effect without held-out pairs"),
    ],
)
def test_settings_that_nothing_reads(config: Path, command: str, override: str, error: str) -> None:
    assert error in refuse(config, *override.split(), command=command)


@pytest.mark.parametrize(
    ("row", "overrides", "error"),
    [
        ({**PAIR, "margin": 2.0}, [], "data.train: 1 pairs have a margin, and nothing reads it; set loss.odpo_alpha"),
        (
            {**PAIR, "chosen_probability": 0.8},
            ["loss.loss_type=hinge"],
            "data.train: 1 pairs have a chosen_probability, and loss.loss_type=hinge does not read it; use sigmoid",
        ),
        (RANKED, ["loss.ld_alpha=0.5"], "in data.train a prompt has up to 3 completions"),
        ({**PAIR, "weight": 2.0}, ["loss.loss_type=aot"], "data.train: 1 examples have a weight other than 1"),
        (RANKED, ["loss.loss_type=plackett_luce", "data.pairing=adjacent"], "plackett_luce is of whole rankings"),
        (PAIR, ["loss.loss_type=plackett_luce", "data.group_by_prompt=true"], "pairs from several rows are no ranking"),
        (DEMONSTRATION, [], "pairs.jsonl:1: the row is a demonstration"),
        (DEMONSTRATION, ["loss.loss_type=sft", "reference.source=live"], "pairs.jsonl:1: the row is a demonstration"),
        (DEMONSTRATION, ["loss.loss_type=sft", "data.pairing=all", "data.group_by_prompt=true"], "nothing is compared"),
        ({**DEMONSTRATION, "label": False}, ["loss.loss_type=sft"], "label=False: a supervised run learns every"),
        ({"prompt_ids": [5]}, ["loss.loss_type=sft"], "no column completion_ids (the row has prompt_ids)"),
    ],
)
def test_data_that_no_loss_reads(config: Path, row: dict[str, Any], overrides: list[str], error: str) -> None:
    written(config, row)
    assert error in refuse(config, *overrides)


def test_held_out_data_are_judged_as_well(config: Path) -> None:
    (config / "held_out.jsonl").write_text(json.dumps({**PAIR, "margin": 1.0}) + "\n")
    overrides = ["data.evaluation=[{path: held_out.jsonl}]", "evaluation.eval_steps=1"]
    assert "data.evaluation.0: 1 pairs have a margin" in refuse(config, *overrides)


def test_precomputing_for_a_supervised_run(config: Path) -> None:
    written(config, DEMONSTRATION)
    message = refuse(config, "loss.loss_type=sft", command="precompute")
    assert "reference" in message


def test_a_second_stage_without_its_first(config: Path) -> None:
    """The shipped configuration of two stages names a folder that the first writes."""
    message = refuse(config, "model.model_name_or_path=runs/smollm2_sft/model")
    assert "model.model_name_or_path=runs/smollm2_sft/model" in message


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("loss", "metric", "error"),
    [
        ("bco", "mean_token_accuracy", "held has no mean_token_accuracy, for it holds no pairs, 0 good and 2 bad"),
        ("[sigmoid, bco]", "rewards/accuracies", "held has no rewards/accuracies, for it holds no pairs"),
    ],
)
def test_a_best_model_by_a_number_that_there_will_not_be(
    config: Path, command: str, loss: str, metric: str, error: str
) -> None:
    rated = [{"prompt_ids": [k], "completion_ids": [8, 2], "label": k == 3} for k in (3, 4, 5)]
    written(config, PAIR, *rated)
    (config / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rated[1:]))
    held_out = ["data.evaluation=[{path: held.jsonl}]", "evaluation.eval_steps=1", f"loss.loss_type={loss}"]
    assert error in refuse(config, *held_out, f"evaluation.metric_for_best_model={metric}", command=command)
