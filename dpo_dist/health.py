"""Whether a run is well, by its own numbers: thresholds, the best evaluation so far, and when to end early.

Everything here follows from sums that all ranks have alike, so all ranks decide alike, and from what a checkpoint
keeps, so a resumed run decides as one that was never stopped.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter

from dpo_dist.config import BEST_BY, EvaluationConfig, HealthConfig, RunConfig
from dpo_dist.errors import NumericsError
from dpo_dist.metrics import HEALTH

_ACCURACY = "rewards/accuracies"
# What is judged in training: what it means where it is above `health.max_<name>`, and what may help.
_JUDGED = {
    "kl": (
        "completions have become less likely than under the reference by so many nats per token",
        "raise loss.beta, or lower train.learning_rate",
    ),
    "displacement": (
        "so large a share of chosen completions is less likely than under the reference",
        "add their likelihood to the loss (loss.loss_type=[sigmoid, sft]), or use loss.loss_type=dpop or apo_zero",
    ),
    "length_drift": (
        "in so large a share of pairs the policy wrongly prefers the longer completion",
        "set loss.rdpo_alpha or loss.ld_alpha, or use loss.loss_type=sigmoid_norm",
    ),
}
_SEEN = ("num_pairs", "num_desirable", "num_undesirable")  # of these at least health.check_pairs are judged at once
_SUMS = {*HEALTH, *HEALTH.values(), *_SEEN}


@dataclass
class Health:
    """What has been seen so far; a checkpoint keeps all of it."""

    sums: dict[str, float] = field(default_factory=dict)  # since training was judged last
    correct: float = 0.0  # of the pairs since training was last compared with an evaluation
    num_pairs: float = 0.0
    crossed: list[str] = field(default_factory=list)  # thresholds that were crossed when they were judged last
    evaluated: int = -1  # the update after which the held-out sets were evaluated last
    best: float | None = None
    best_step: int = 0  # 0: no checkpoint is the best
    num_worse: int = 0  # evaluations in a row that were no better than the best
    num_skipped: int = 0  # steps in a row that were left out
    ended: str = ""  # why the run ends before its last step

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps; JSON keeps every bit of a float."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Health":
        """What `to_json` gave; what an earlier version did not keep is as in the beginning.

        Raises:
            ValueError: it is something else, of another version for instance.
        """
        unknown = values.keys() - {known.name for known in dataclasses.fields(cls)}
        health = TypeAdapter(cls).validate_json(json.dumps(values), strict=True)
        if unknown := sorted(unknown | health.sums.keys() - _SUMS):
            raise ValueError(f"health has no {', '.join(unknown)}; another version of dpo-dist wrote it")
        return health


def restored(saved: Mapping[str, Any], saved_config: Mapping[str, Any], config: RunConfig) -> Health:
    """What a checkpoint kept, less what a change of the rules since then has made void.

    A run that had ended goes on; by another metric nothing is the best yet; thresholds are judged anew.

    Args:
        saved: from `to_json`.
        saved_config: the resolved configuration it was saved with.
        config: this run's.
    """
    health, now = Health.from_json(saved), config.model_dump(mode="json")
    evaluation, thresholds = (saved_config.get(section, {}) for section in ("evaluation", "health"))
    # What an earlier version did not know was what it is by default.
    rules = {key: value for key, value in now["health"].items() if key not in ("non_finite", "max_skipped_steps")}
    has_changed = any(thresholds.get(key, value) != value for key, value in rules.items())
    if evaluation != now["evaluation"] or has_changed:
        health.ended = ""
    if has_changed:
        health.crossed = []
    if evaluation.get("metric_for_best_model") != now["evaluation"]["metric_for_best_model"]:
        health.best, health.best_step, health.num_worse = None, 0, 0
    return health


def judge_step(health: Health, totals: Mapping[str, float], config: RunConfig) -> list[str]:
    """Take in the sums of a step; what is to be said once enough pairs have been seen.

    Args:
        health: changed.
        totals: `metrics.SUMS` of the step, over all ranks.
        config: the run's.
    """
    health.num_skipped = 0
    health.correct += totals[_ACCURACY]
    health.num_pairs += totals["num_pairs"]
    if not config.has_reference:
        return []
    for name in _SUMS:
        health.sums[name] = health.sums.get(name, 0.0) + totals[name]
    num_pairs, num_seen = health.sums["num_pairs"], sum(health.sums[name] for name in _SEEN)
    if num_seen < config.health.check_pairs:
        return []
    sums, health.sums = health.sums, {}
    said, kind = [], "pairs" if num_pairs == num_seen else "ratings" if not num_pairs else "pairs and ratings"
    for name, (meaning, knob) in _JUDGED.items():
        if number := sums[HEALTH[name]]:
            what = f"over the last {num_seen:.0f} {kind} {meaning}; {knob}"
            said += _cross(health, config.health, name, sums[name] / number, what)
    return said


def judge_not_finite(health: Health, text: str, config: RunConfig) -> str:
    """Leave a step out, or end the run; what is to be said of it.

    Args:
        health: changed.
        text: which step, its examples and its numbers.
        config: the run's.
    Raises:
        NumericsError: steps are not left out, or too many in a row would be.
    """
    if config.health.non_finite == "stop":
        raise NumericsError(
            f"{text}; what was saved before is intact, and a resumed run comes to the same step. {_steadier(config)}, "
            "or leave such steps out with health.non_finite=skip"
        )
    health.num_skipped += 1
    if health.num_skipped > (limit := config.health.max_skipped_steps):
        raise NumericsError(
            f"{text}; more than health.max_skipped_steps={limit} steps in a row would be left out: it is not the data. "
            f"{_steadier(config)}; what was saved before is intact"
        )
    return f"{text}; the weights stay as they are, and the run goes on (health.non_finite=skip)"


def _steadier(config: RunConfig) -> str:
    """What makes numbers smaller, or their range larger."""
    narrow = config.model.dtype == "float16"
    return "Lower train.learning_rate" + (", use model.dtype=bfloat16 or float32" if narrow else "")


def accuracy_gap(health: Health, values: Mapping[str, float]) -> float | None:
    """Reward accuracy in training lately, less that of a held-out set; None if either has none."""
    if not health.num_pairs or _ACCURACY not in values:
        return None
    return health.correct / health.num_pairs - values[_ACCURACY]


def judge_evaluation(
    health: Health, step: int, sets: Mapping[str, Mapping[str, float]], config: RunConfig
) -> list[str]:
    """Take in an evaluation of all held-out sets; what is to be said of it.

    Args:
        health: changed.
        step: updates before it.
        sets: numbers of each held-out set by its name.
        config: the run's.
    """
    said: list[str] = []
    if health.num_pairs >= config.health.check_pairs:
        for name, values in sets.items():
            said += _judge_gap(health, name, values, config)
        health.correct = health.num_pairs = 0.0
    health.evaluated = step
    if step > 0:  # there is no checkpoint of the start
        said += _compare_with_best(health, step, sets, config)
    return said


def _judge_gap(health: Health, name: str, values: Mapping[str, float], config: RunConfig) -> list[str]:
    gap = accuracy_gap(health, values)
    if gap is None:
        return []
    what = (
        f"reward accuracy was {health.correct / health.num_pairs:.2f} over the last {health.num_pairs:.0f} pairs, and "
        f"is {values[_ACCURACY]:.2f} on {name}: training pairs are learnt by heart; lower train.num_train_epochs or "
        "train.learning_rate, raise loss.beta, or set evaluation.early_stopping_patience"
    )
    return _cross(health, config.health, "accuracy_gap", gap, what, of=name)


def _compare_with_best(
    health: Health, step: int, sets: Mapping[str, Mapping[str, float]], config: RunConfig
) -> list[str]:
    evaluation = config.evaluation
    named = evaluation.best_of(tuple(sets))
    if named is None:
        return []
    dataset, metric = named
    value, sign = sets[dataset][metric], 1.0 if BEST_BY[metric] else -1.0
    better_by = float("inf") if health.best is None else sign * (value - health.best)
    health.num_worse = 0 if better_by > evaluation.early_stopping_threshold else health.num_worse + 1
    if better_by > 0:
        health.best, health.best_step = value, step
    if evaluation.early_stopping_patience is None or health.num_worse < evaluation.early_stopping_patience:
        return []
    return _end(health, evaluation, dataset, metric)


def _end(health: Health, evaluation: EvaluationConfig, dataset: str, metric: str) -> list[str]:
    times = f"{health.num_worse} evaluation{'' if health.num_worse == 1 else 's'} in a row"
    health.ended = (
        f"evaluation.early_stopping_patience={evaluation.early_stopping_patience}: {metric} of {dataset} was best "
        f"after step {health.best_step} ({health.best:.4g}), and no better in {times}"
    )
    return [health.ended]


def _cross(health: Health, config: HealthConfig, name: str, value: float, what: str, of: str = "") -> list[str]:
    """What is to be said of a value, of a held-out set for instance, once each time it goes above its threshold."""
    limit, key = getattr(config, f"max_{name}"), f"{name} {of}".strip()
    was_above = key in health.crossed
    if value <= limit:
        health.crossed = [other for other in health.crossed if other != key]
        return []
    if was_above:
        return []
    health.crossed.append(key)
    text = f"health.max_{name}={limit:g}: {name} is {value:.3g}: {what}"
    if config.action == "stop":
        health.ended = text
    return [text]
