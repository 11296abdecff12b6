"""Settings and data that do not go together: found when the data have been read, before any model is loaded."""

from collections.abc import Iterable, Mapping

from dpo_dist.config import RunConfig
from dpo_dist.errors import ConfigError
from dpo_dist.losses import LOSSES
from dpo_dist.tokenization import TokenizedDataset


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
    if loss.odpo_alpha and not next(iter(sets.values())).preferences.num_margins:
        raise ConfigError(
            f"loss.odpo_alpha={loss.odpo_alpha:g} has no effect: no row of data.train has a margin other than 0, nor "
            "scores; leave this out, or give the data a column margin"
        )


def data_remarks(config: RunConfig, sets: Iterable[TokenizedDataset]) -> list[str]:
    """What of a setting the data make superfluous, a sentence each; the result is the same."""
    pairing = config.data.pairing
    if pairing == "all" or config.trains_on_demonstrations or any(one.preferences.num_ranked for one in sets):
        return []
    return [f"data.pairing={pairing} has no effect: no row has a list of completions; leave this out"]


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
