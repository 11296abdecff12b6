"""Rules of the sections `evaluation` and `health`, as in `rules.py`."""

from collections.abc import Iterator

from dpo_dist.config.evaluation import BEST_BY
from dpo_dist.config.models import RunConfig
from dpo_dist.config.source_rules import Broken, KeyPath, Unread

_OF_A_BEST_MODEL = ("load_best_model_at_end", "early_stopping_patience", "early_stopping_threshold")
_OF_TRAINING = ("max_kl", "max_displacement", "max_length_drift")
_OF_PAIRS = ("rewards/accuracies", "rewards/margins", "logps/chosen")


def evaluation_keys_without_effect(config: RunConfig) -> dict[KeyPath, Unread]:
    """As `rules.keys_without_effect`, of these sections."""
    found: dict[KeyPath, Unread] = {}
    evaluation = config.evaluation
    if not config.data.has_held_out:
        for key in ("eval_steps", "eval_on_start", "metric_for_best_model"):
            why = "has no effect without data.evaluation or data.holdout; give held-out data, or leave this out"
            found["evaluation", key] = Unread(("data", "evaluation"), why)
    if evaluation.metric_for_best_model is None:
        for key in _OF_A_BEST_MODEL:
            why = "has no effect without evaluation.metric_for_best_model; set it, say to loss, or leave this out"
            found["evaluation", key] = Unread(("evaluation", "metric_for_best_model"), why)
    elif evaluation.early_stopping_patience is None:
        why = "has no effect without evaluation.early_stopping_patience; set it, or leave this out"
        found["evaluation", "early_stopping_threshold"] = Unread(("evaluation", "early_stopping_patience"), why)
    return found | _of_health(config)


def _of_health(config: RunConfig) -> dict[KeyPath, Unread]:
    """A threshold that nothing is held against trains the same model, but does not stop a run that it was to stop."""
    found: dict[KeyPath, Unread] = {}
    if config.health.non_finite == "stop":
        why = "has no effect without health.non_finite=skip; set it, or leave this out"
        found["health", "max_skipped_steps"] = Unread(("health", "non_finite"), why)
    warns_only = config.health.action == "warn"
    has_held_out_pairs = config.data.has_held_out and config.compares
    if not config.has_reference:
        for key in _OF_TRAINING:
            why = "has no effect without a reference; leave this out"
            found["health", key] = Unread(("reference", "source"), why, warns_only)
    if config.has_reference and config.rated == "all":
        for key in ("max_displacement", "max_length_drift"):
            why = "has no effect: losses of single completions alone compare no pairs; leave this out"
            found["health", key] = Unread(("loss", "loss_type"), why, warns_only)
    if not has_held_out_pairs:
        why = "has no effect without held-out pairs (data.evaluation, data.holdout); leave this out"
        found["health", "max_accuracy_gap"] = Unread(("data", "evaluation"), why, warns_only)
    if not config.has_reference and not has_held_out_pairs:
        for key in ("check_pairs", "action"):
            why = "has no effect: nothing is judged; leave this out"
            found["health", key] = Unread(("reference", "source"), why, key == "check_pairs")
    return found


def evaluation_rules(config: RunConfig) -> Iterator[Broken]:
    """Every rule of these sections that a configuration breaks."""
    evaluation, path = config.evaluation, ("evaluation", "metric_for_best_model")
    if config.health.non_finite == "skip" and config.adapter.peft_type == "adalora":
        why = "does not go with adapter.peft_type=adalora, which takes ranks away at certain steps; leave it out"
        yield ("health", "non_finite"), (("adapter", "peft_type"),), why
    if evaluation.metric_for_best_model is None or not config.data.has_held_out:
        return
    names = config.data.evaluation_names
    chosen = evaluation.best_of(names)
    known = [metric for metric in BEST_BY if config.compares or metric not in _OF_PAIRS]
    if chosen is None or chosen[1] not in known:
        examples = known if len(names) == 1 else [f"{name}/{metric}" for name in names for metric in known]
        yield path, (("data", "evaluation"), ("loss", "loss_type")), f"is not known; it must be {', '.join(examples)}"
    if not evaluation.eval_steps:
        yield path, (("evaluation", "eval_steps"),), "is never measured after an update; set evaluation.eval_steps"
