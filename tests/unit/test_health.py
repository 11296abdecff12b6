"""What is said of a run's numbers, when, and what a resumed run makes of it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_dist.config import RunConfig, load_config
from dpo_dist.errors import ConfigError
from dpo_dist.health import Health, accuracy_gap, judge_evaluation, judge_step, restored
from dpo_dist.metrics import HEALTH, SUMS

WELL = {"num_pairs": 4.0, "num_compared": 100.0, "kl": 10.0, "displacement": 1.0, "length_drift": 0.0}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    values = {
        "model": {"model_name_or_path": "m"},
        "data": {"train": [{"path": "d"}], "evaluation": [{"path": "hh.jsonl"}, {"path": "own.jsonl"}]},
        "train": {"output_dir": "out"},
        "evaluation": {"eval_steps": 1},
    }
    path.write_text(yaml.safe_dump(values))
    return path


def totals(**changes: float) -> dict[str, float]:
    """Sums of a step of four pairs, two of them right."""
    return {**dict.fromkeys(SUMS, 0.0), "rewards/accuracies": 2.0, **WELL, **changes}


def judged(config: RunConfig, *steps: dict[str, float]) -> tuple[Health, list[list[str]]]:
    health = Health()
    return health, [judge_step(health, step, config) for step in steps]


# ---- training


@pytest.mark.parametrize(
    ("sums", "text", "knob"),
    [
        ({"kl": 101.0}, "health.max_kl=1: kl is 1.01: over the last 4 pairs", "raise loss.beta"),
        ({"displacement": 4.0}, "health.max_displacement=0.9: displacement is 1:", "loss.loss_type=[sigmoid, sft]"),
        ({"length_drift": 1.0}, "health.max_length_drift=0.2: length_drift is 0.25:", "loss.rdpo_alpha"),
    ],
)
def test_a_threshold_names_the_setting_to_change(path: Path, sums: dict[str, float], text: str, knob: str) -> None:
    config = load_config(path, ["health.check_pairs=4"])
    health, (said,) = judged(config, totals(**sums))
    assert len(said) == 1
    assert said[0].startswith(text)
    assert knob in said[0]
    assert health.ended == ""
    stops, (same,) = judged(load_config(path, ["health.check_pairs=4", "health.action=stop"]), totals(**sums))
    assert same == said
    assert stops.ended == said[0]


@pytest.mark.parametrize("name", HEALTH)
def test_each_threshold_can_be_moved(path: Path, name: str) -> None:
    sums = totals(**{name: WELL["num_compared" if name == "kl" else "num_pairs"]})  # a mean of 1
    for setting, number in (("0.99", 1), ("1", 0)):
        _, (said,) = judged(load_config(path, ["health.check_pairs=4", f"health.max_{name}={setting}"]), sums)
        assert len(said) == number


def test_nothing_is_judged_by_too_few_pairs_and_means_are_over_all_of_them(path: Path) -> None:
    config = load_config(path, ["health.check_pairs=12"])
    worse = totals(displacement=4.0)
    _, said = judged(config, worse, worse, totals(displacement=0.0), totals(), worse, worse)
    assert [len(messages) for messages in said] == [0, 0, 0, 0, 0, 0]  # 8 of 12, then 9 of 12
    _, said = judged(config, worse, worse, worse)
    assert [len(messages) for messages in said] == [0, 0, 1]


def test_what_stays_above_is_said_once_and_again_after_it_was_well(path: Path) -> None:
    config, bad = load_config(path, ["health.check_pairs=4"]), totals(kl=200.0)
    _, said = judged(config, bad, bad, totals(), bad)
    assert [len(messages) for messages in said] == [1, 0, 0, 1]


def test_without_a_reference_there_is_no_distance_from_it(path: Path) -> None:
    config = load_config(path, ["reference.source=none", "health.max_accuracy_gap=0.1"])
    health, said = judged(config, *[totals(kl=1e6, displacement=4.0)] * 200)
    assert not any(said)
    assert health.num_pairs == 800  # accuracies are known nevertheless


def test_rated_completions_are_judged_by_their_number(path: Path) -> None:
    """A run on ratings alone has no pairs, and a policy that leaves the reference all the same."""
    config = load_config(path, ["health.check_pairs=8", "loss.loss_type=kto"])
    rated = totals(num_pairs=0.0, num_desirable=3.0, num_undesirable=1.0, kl=101.0, **{"rewards/accuracies": 0.0})
    health, said = judged(config, rated, rated)
    assert said[0] == []
    assert [text.partition("; ")[0] for text in said[1]] == [
        "health.max_kl=1: kl is 1.01: over the last 8 ratings completions have become less likely than under the "
        "reference by so many nats per token"
    ]
    assert Health.from_json(replace(health, sums=dict.fromkeys(("num_desirable", "kl"), 1.0)).to_json()).sums
    with pytest.raises(ConfigError, match=r"max_displacement.*compare no pairs"):
        load_config(path, ["loss.loss_type=kto", "health.max_displacement=0.5", "health.action=stop"])


# ---- evaluation


def evaluated(accuracy: float = 0.5, loss: float = 0.6) -> dict[str, float]:
    return {"loss": loss, "rewards/accuracies": accuracy, "num_pairs": 10}


def test_training_accuracy_far_above_a_held_out_one(path: Path) -> None:
    config = load_config(path, ["health.check_pairs=8"])
    right = totals(**{"rewards/accuracies": 4.0})
    health, _ = judged(config, right, right)
    assert accuracy_gap(health, evaluated(0.7)) == pytest.approx(0.3)
    lenient, again = load_config(path, ["health.check_pairs=8", "health.max_accuracy_gap=0.35"]), replace(health)
    assert judge_evaluation(again, 2, {"hh": evaluated(0.7)}, lenient) == []
    (said,) = judge_evaluation(health, 2, {"hh": evaluated(0.7), "own": evaluated(0.8)}, config)
    assert said.startswith(
        "health.max_accuracy_gap=0.25: accuracy_gap is 0.3: reward accuracy was 1.00 over the last 8"
    )
    assert "0.70 on hh" in said and "evaluation.early_stopping_patience" in said
    assert accuracy_gap(health, evaluated(0.7)) is None  # nothing has been seen since
    judge_step(health, right, config)
    assert judge_evaluation(health, 3, {"hh": evaluated(0.1)}, config) == []  # 4 pairs are too few
    judge_step(health, right, config)
    assert judge_evaluation(health, 4, {"hh": evaluated(0.1)}, config) == []  # said already
    for step in (5, 6):
        judge_step(health, right, config)
        judge_step(health, right, config)
        judge_evaluation(health, step, {"hh": evaluated(0.9)}, config)
    assert health.crossed == []


BEST = ["evaluation.metric_for_best_model=hh/loss", "evaluation.early_stopping_patience=2"]


def compared(config: RunConfig, losses: list[float], health: Health | None = None) -> Health:
    health = health or Health()
    for step, loss in enumerate(losses, start=health.evaluated + 1):
        judge_evaluation(health, step, {"hh": evaluated(loss=loss), "own": evaluated(loss=-9.0)}, config)
    return health


def test_patience_counts_evaluations_in_a_row(path: Path) -> None:
    config = load_config(path, BEST)
    health = compared(config, [0.1, 0.7, 0.6, 0.65, 0.59, 0.6])  # the start does not count: it has no checkpoint
    assert (health.best, health.best_step, health.num_worse, health.ended) == (0.59, 4, 1, "")
    (said,) = judge_evaluation(health, 6, {"hh": evaluated(loss=0.59), "own": evaluated()}, config)
    assert said == health.ended
    assert said == (
        "evaluation.early_stopping_patience=2: loss of hh was best after step 4 (0.59), and no better in 2 evaluations "
        "in a row"
    )


def test_a_threshold_of_improvement(path: Path) -> None:
    """As transformers does: what is better by less is the best, and still counts as worse."""
    config = load_config(path, [*BEST, "evaluation.early_stopping_threshold=0.05"])
    health = compared(config, [9.0, 0.6, 0.58, 0.56])
    assert (health.best, health.best_step, health.num_worse) == (0.56, 3, 2)
    assert health.ended


def test_more_of_an_accuracy_is_better(path: Path) -> None:
    config = load_config(path, ["evaluation.metric_for_best_model=own/rewards/accuracies"])
    health = Health()
    for step, accuracy in enumerate([0.5, 0.7, 0.6], start=1):
        judge_evaluation(health, step, {"hh": evaluated(), "own": evaluated(accuracy)}, config)
    assert (health.best, health.best_step, health.ended) == (0.7, 2, "")


def test_a_checkpoint_keeps_all_of_it(path: Path) -> None:
    config = load_config(path, [*BEST, "health.check_pairs=100"])
    values: dict[str, Any] = config.model_dump(mode="json")
    health, _ = judged(config, totals(kl=0.1 + 0.2))
    health.crossed = ["kl"]
    compared(config, [0.0, 0.6, 0.7, 0.8], health)
    assert health.ended
    saved = json.loads(json.dumps(health.to_json()))
    assert restored(saved, values, config) == health
    for change in ("evaluation.early_stopping_threshold=0.1", "health.action=stop"):
        goes_on = restored(saved, values, load_config(path, [*BEST, "health.check_pairs=100", change]))
        voided = {"crossed": []} if change.startswith("health") else {}
        assert goes_on == replace(health, ended="", **voided)


def test_by_another_metric_nothing_is_the_best_yet(path: Path) -> None:
    """A loss of 0.6 is no accuracy of 0.6."""
    config = load_config(path, BEST)
    health = compared(config, [9.0, 0.6, 0.7])
    other = load_config(path, ["evaluation.metric_for_best_model=hh/rewards/accuracies"])
    again = restored(health.to_json(), config.model_dump(mode="json"), other)
    assert (again.best, again.best_step, again.num_worse) == (None, 0, 0)
    judge_evaluation(again, 3, {"hh": evaluated(0.4), "own": evaluated()}, other)
    assert (again.best, again.best_step) == (0.4, 3)


# ---- settings


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        (["evaluation.metric_for_best_model=loss"], "is not known; it must be hh/loss, hh/rewards/accuracies"),
        (["evaluation.metric_for_best_model=other/loss"], "is not known; it must be hh/loss"),
        (["evaluation.metric_for_best_model=hh/entropy"], "is not known; it must be hh/loss"),
        (
            ["evaluation.metric_for_best_model=hh/loss", "evaluation.eval_steps=0", "evaluation.eval_on_start=true"],
            "is never measured after an update; set evaluation.eval_steps",
        ),
        (
            ["evaluation.metric_for_best_model=hh/rewards/margins", "loss.loss_type=sft"],
            "must be hh/loss, hh/mean_token_accuracy, own/loss",
        ),
        (["evaluation.load_best_model_at_end=true"], "no effect without evaluation.metric_for_best_model"),
        (["evaluation.early_stopping_patience=2"], "no effect without evaluation.metric_for_best_model"),
        (
            ["evaluation.metric_for_best_model=hh/loss", "evaluation.early_stopping_threshold=0.1"],
            "no effect without evaluation.early_stopping_patience",
        ),
        (["loss.loss_type=simpo", "health.max_kl=0.5", "health.action=stop"], "has no effect without a reference"),
        (
            ["loss.loss_type=sft", "health.max_accuracy_gap=0.5", "health.action=stop"],
            "has no effect without held-out pairs",
        ),
        (["loss.loss_type=sft", "health.action=stop"], "has no effect: nothing is judged"),
        (["health.max_displacement=1.5"], "must be <= 1"),
        (["health.max_kl=0"], "must be > 0"),
    ],
)
def test_mistakes(path: Path, settings: list[str], error: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(path, settings)
    assert error in str(caught.value)


def test_one_held_out_set_needs_no_name(path: Path) -> None:
    path.write_text(path.read_text().replace("- path: own.jsonl", "").replace("  - path: own.jsonl\n", ""))
    config = load_config(path, ["evaluation.metric_for_best_model=loss"])
    assert config.evaluation.best_of(config.data.evaluation_names) == ("hh", "loss")
