"""Settings and data that do not go together: found when the data have been read, before any model is loaded."""

from collections.abc import Iterable, Mapping

from dpo_dist.config import RunConfig
from dpo_dist.errors import ConfigError
from dpo_dist.losses import LOSSES
from dpo_dist.tokenization import TokenizedDataset

# Of the weight of all good completions to that of all bad ones; as much below 1 as above it is no cause to speak.
_LEAST_SHARE, _MOST_SHARE = 0.75, 1.33


def require_data_for(config: RunConfig, sets: Mapping[str, TokenizedDataset]) -> None:
    """Whatever the data say must be read by a loss, and whatever a setting asks for must be in the data.

    Args:
        config: the run's.
        sets: every data set under its place in the configuration, `data.train` first.
    Raises:
        ConfigError: the first that does not fit.
    """
    if config.trains_on_demonstrations:
        return
    for place, dataset in sets.items():
        _require_readers(config, place, dataset)
    loss = config.loss
    if config.rated == "rest":
        _require_both_kinds(config, next(iter(sets.values())))
    if loss.odpo_alpha and not next(iter(sets.values())).preferences.num_margins:
        raise ConfigError(
            f"loss.odpo_alpha={loss.odpo_alpha:g} has no effect: no row of data.train has a margin other than 0, nor "
            "scores; leave this out, or give the data a column margin"
        )


def require_metric_in(config: RunConfig, held_out: Mapping[str, TokenizedDataset]) -> None:
    """The number that the best model is chosen by is one that its held-out set has.

    Args:
        config: the run's.
        held_out: the sets by their names.
    Raises:
        ConfigError: it has none.
    """
    named = config.evaluation.best_of(tuple(held_out))
    if named is None:
        return
    name, metric = named
    found = held_out[name].preferences
    has_good = found.num_desirable > 0
    has = {
        "rewards/accuracies": False,
        "rewards/margins": has_good and found.num_rated > found.num_desirable,
        "logps/chosen": has_good,
        "mean_token_accuracy": has_good or not found.num_rated,
    }
    if found.num_pairs or has.get(metric, True):
        return
    raise ConfigError(
        f"evaluation.metric_for_best_model={config.evaluation.metric_for_best_model}: {name} has no {metric}, for it "
        f"holds no pairs, {found.num_desirable} good and {found.num_rated - found.num_desirable} bad completions; "
        "take loss, or give other held-out data"
    )


def data_remarks(config: RunConfig, sets: Iterable[TokenizedDataset]) -> list[str]:
    """What to know of settings and data that go together, a sentence each.

    Args:
        config: the run's.
        sets: its data sets, the one that is trained on first.
    """
    sets = list(sets)
    found = _balance(config, sets[0]) if config.loss.rates_completions else []
    pairing = config.data.pairing
    if pairing == "all" or config.trains_on_demonstrations or any(one.preferences.num_ranked for one in sets):
        return found
    return [*found, f"data.pairing={pairing} has no effect: no row has a list of completions; leave this out"]


def _balance(config: RunConfig, training: TokenizedDataset) -> list[str]:
    """Whether good and bad completions weigh alike: the KTO paper's range (arXiv:2402.01306, eq. 8)."""
    loss, found = config.loss, training.preferences
    good, bad = found.num_desirable, found.num_rated - found.num_desirable
    if not good or not bad:
        kind = "good" if good else "bad"
        return [f"all {found.num_rated} rated completions of data.train are {kind}: a loss of ratings needs both kinds"]
    share = loss.desirable_weight * good / (loss.undesirable_weight * bad)
    if _LEAST_SHARE <= share <= _MOST_SHARE:
        return []
    wanted = sorted(round(factor * loss.undesirable_weight * bad / good, 2) for factor in (1.0, _MOST_SHARE))
    return [
        f"{good} good and {bad} bad completions, and with these weights the good ones count {share:.3g} times as much; "
        f"1 to {_MOST_SHARE} is recommended for kto: set loss.desirable_weight to {wanted[0]:g} to {wanted[1]:g}"
    ]


def _require_both_kinds(config: RunConfig, training: TokenizedDataset) -> None:
    """Losses of pairs beside losses of single completions."""
    found, chosen = training.preferences, " and ".join(config.loss.loss_types)
    for number, kind in ((found.num_pairs, "pair"), (found.num_rated, "completion that stays unpaired")):
        if not number:
            raise ConfigError(
                f"loss.loss_type={chosen} adds up a loss of pairs and one of completions that stay unpaired, and "
                f"data.train has no {kind}; leave the one that has nothing to learn from out"
            )


def _require_readers(config: RunConfig, place: str, dataset: TokenizedDataset) -> None:
    loss, found = config.loss, dataset.preferences
    chosen = " and ".join(loss.loss_types)
    if found.num_given_margins and not loss.odpo_alpha:
        raise ConfigError(
            f"{place}: {found.num_given_margins} pairs have a margin, and nothing reads it; set loss.odpo_alpha (with "
            "loss.loss_type=sigmoid), or remove the column margin"
        )
    if found.num_soft_labels and "sigmoid" not in loss.loss_types:
        raise ConfigError(
            f"{place}: {found.num_soft_labels} pairs have a chosen_probability, and loss.loss_type={chosen} does not "
            "read it; use sigmoid, or remove the column"
        )
    if loss.ld_alpha is not None and found.max_completions > 2:
        raise ConfigError(
            f"loss.ld_alpha={loss.ld_alpha:g} weighs tokens beyond the shorter completion of a pair, and in {place} a "
            f"prompt has up to {found.max_completions} completions; use pairs, or leave this out"
        )
    if found.num_weighted and any(LOSSES[name].needs_matching for name in loss.loss_types):
        raise ConfigError(
            f"{place}: {found.num_weighted} examples have a weight other than 1, and loss.loss_type={chosen} compares "
            "sorted pairs that count alike; remove the column weight, or use another loss"
        )
