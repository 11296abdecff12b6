"""Which source is the cheapest exact one for a run, and why."""

from dataclasses import dataclass
from typing import Literal

from dpo_dist.config import ReferenceConfig

Source = Literal["live", "cache", "adapter_off", "none"]

# Of a device's memory, what weights, gradients and optimizer may take so that activations have room.
STATE_SHARE = 0.8


@dataclass(frozen=True)
class Situation:
    """What the choice depends on."""

    has_reference: bool  # a loss reads one, or the user asks for it
    beyond_a_cache: str  # why a sum for each completion of the data is not enough; empty where it is
    has_adapters: bool
    base_is_reference: bool  # the policy without its adapters (or with a frozen copy of them) is the reference
    passes: float  # how often an example's reference log-probability is asked for, evaluation included
    num_rows: int  # completions to be scored, in all data sets
    num_cached: int  # of these, what a cache holds already
    policy_gib: float  # weights, gradients and optimizer of the policy, on one device
    reference_gib: float  # a second model's share of the same device
    device_gib: float | None  # None: not known


def choose_source(config: ReferenceConfig, situation: Situation) -> tuple[Source, str]:
    """The source of a run and the reason for it, as a phrase.

    Args:
        config: what the user wants; a `source` other than `auto` is taken.
        situation: the run.
    """
    if config.source != "auto":
        return config.source, "as configured"
    if given := _only_way(config, situation):
        return given
    if config.cache_dir is not None:
        return "cache", "reference.cache_dir is given"
    if situation.num_rows and situation.num_cached == situation.num_rows:
        return "cache", "it is complete"
    if situation.passes > 1:
        return "cache", f"every example is used {situation.passes:.3g} times, and its reference computed once"
    if _holds_reference(config, situation):
        return "adapter_off", "the policy holds its reference, and no second model is needed"
    if both := _too_large(situation):
        return "cache", (
            f"policy and reference need {both:.3g} GiB of each device's {situation.device_gib:.3g} GiB before any "
            "activation; computed before the policy is loaded"
        )
    return "live", "every example is used once, and two models fit"


def _only_way(config: ReferenceConfig, situation: Situation) -> tuple[Source, str] | None:
    if not situation.has_reference:
        return "none", "no loss reads one"
    if config.sync_ref_model:
        return "live", "reference.sync_ref_model lets it follow the policy"
    if config.per_microbatch:
        return "live", "reference.per_microbatch asks for it"
    if situation.beyond_a_cache:
        source = "adapter_off" if _holds_reference(config, situation) else "live"
        return source, situation.beyond_a_cache
    return None


def _holds_reference(config: ReferenceConfig, situation: Situation) -> bool:
    return situation.has_adapters and situation.base_is_reference and config.dtype is None


def _too_large(situation: Situation) -> float | None:
    both = situation.policy_gib + situation.reference_gib
    device = situation.device_gib
    return both if device is not None and both > STATE_SHARE * device else None
