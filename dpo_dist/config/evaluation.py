"""The sections `evaluation` and `health`."""

from typing import Annotated, Literal

from pydantic import Field

from dpo_dist.config.section import Flag, Number, Section, Text

Share = Annotated[Number, Field(ge=0, le=1)]

# What a best model may be chosen by -> whether more of it is better.
BEST_BY: dict[str, bool] = {
    "loss": False,
    "rewards/accuracies": True,
    "rewards/margins": True,
    "logps/chosen": True,
    "mean_token_accuracy": True,
}


class EvaluationConfig(Section):
    """When the held-out data sets are evaluated, and what follows from it."""

    eval_steps: Annotated[int, Field(ge=0)] = 0
    """Evaluate every this many updates, and after the last one; more than the run has: only at the end. 0: never."""
    eval_on_start: Flag = False
    """Evaluate before the first update, too."""
    metric_for_best_model: Text | None = None
    """Save a checkpoint whenever this number of a held-out set is better than any before, and keep the best whatever
    checkpoint.save_total_limit is: `loss`, `rewards/accuracies`, `rewards/margins`, `logps/chosen` or
    `mean_token_accuracy`; of several held-out sets the name first, as in `hh/loss`. null: no checkpoint is the best."""
    load_best_model_at_end: Flag = False
    """Write the best checkpoint's weights to `model/` instead of the last ones (metric_for_best_model)."""
    early_stopping_patience: Annotated[int, Field(ge=1)] | None = None
    """End the run after this many evaluations in a row that are no better than the best one (metric_for_best_model).
    null: never."""
    early_stopping_threshold: Annotated[Number, Field(ge=0)] = 0.0
    """By how much an evaluation must be better than the best one to count as better for early_stopping_patience."""

    def best_of(self, names: tuple[str, ...]) -> tuple[str, str] | None:
        """The held-out set and the metric that metric_for_best_model names; None where it names none.

        Args:
            names: of the held-out sets.
        """
        text = self.metric_for_best_model or ""
        for metric in BEST_BY:
            if text == metric and len(names) == 1:
                return names[0], metric
            if text.endswith(f"/{metric}") and text.removesuffix(f"/{metric}") in names:
                return text.removesuffix(f"/{metric}"), metric
        return None


class HealthConfig(Section):
    """What of a run's numbers is cause for concern, and what happens then."""

    non_finite: Literal["stop", "skip"] = "stop"
    """A step whose loss or gradient is NaN or infinite never changes the weights. `stop`: the run ends, and names the
    step's examples; `skip`: it names them, leaves the step out and goes on."""
    max_skipped_steps: Annotated[int, Field(ge=1)] = 3
    """So many steps in a row may be left out (non_finite); after one more the run ends."""
    action: Literal["warn", "stop"] = "warn"
    """`warn`: say so, and which setting to change, each time a threshold is crossed; `stop`: say so, and end the run as
    early stopping does, with a checkpoint and a model."""
    check_pairs: Annotated[int, Field(ge=1)] = 512
    """Judge training by the means over this many pairs (of ratings: completions) at a time, and no evaluation after
    fewer."""
    max_kl: Annotated[Number, Field(gt=0)] = 1.0
    """Nats per token that completions of the data may have become less likely than under the reference (`kl`)."""
    max_displacement: Share = 0.9
    """Share of pairs whose chosen completion may be less likely than under the reference (`displacement`). 1: all."""
    max_length_drift: Share = 0.2
    """Share of pairs that may be judged against their label in favour of the longer completion, less those in favour of
    the shorter one (`length_drift`). 1: all."""
    max_accuracy_gap: Share = 0.25
    """By how much reward accuracy in training, since the last evaluation, may be above that of a held-out set
    (`accuracy_gap`). 1: by any amount."""
