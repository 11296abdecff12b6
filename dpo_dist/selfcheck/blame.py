"""Whose fault it is that two evaluations differ: dtype, dropout, reference, cache, attention or packing."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from dpo_dist.distributed import all_gather_json, broadcast_json
from dpo_dist.engine import TrainingEngine
from dpo_dist.errors import NumericsError
from dpo_dist.noise import describe, is_rounding
from dpo_dist.reference import ModelReference


def blame_weights(logps: Mapping[str, Float[Tensor, " C"]]) -> list[str]:
    """Before all others: what is not a number differs from everything."""
    return [
        f"weights: log-probabilities of the {name} are not finite; a weight in its folder is NaN or infinite, or "
        "model.dtype=float16 is too narrow for it (bfloat16 and float32 are not)"
        for name, logps_C in logps.items()
        if not torch.isfinite(logps_C).all()
    ]


def blame_dropout(again: Sequence[float]) -> list[str]:
    """Two answers for one micro-batch."""
    if is_rounding(again):
        return []
    return [
        "dropout: the policy gives two different answers for the same micro-batch, some layer is still random "
        f"({describe(again)})"
    ]


def blame_reference(policy: TrainingEngine, reference: ModelReference, engines: Sequence[float]) -> list[str]:
    """The fault of a model that does not agree to the last bit; collective, equal on every rank."""
    if policy.dtype != reference.dtype:
        return [f"dtype: the policy computes in {policy.dtype}, the reference in {reference.dtype}"]
    theirs = None if policy.model.adapter is not None else reference.named_full_parameters()
    differing = None  # the first rank holds the whole weights
    for (name, mine), (_, its) in zip(policy.named_full_parameters(), theirs, strict=True) if theirs else ():
        if mine is not None and its is not None and differing is None and not torch.equal(mine, its):
            differing = name
    if name := broadcast_json(differing):
        return [f"reference: its weights are not the policy's, first {name}, although both were loaded from one folder"]
    if is_rounding(engines):
        return []  # a kernel whose order of sums depends on where its operands lie in memory; an adapter that adds 0
    return [f"reference: with equal weights it gives other log-probabilities than the policy ({describe(engines)})"]


def blame_cache(stored: Sequence[float]) -> list[str]:
    """Stored values against the policy's first answer, where these must be equal."""
    if is_rounding(stored):
        return []
    return [
        f"reference: stored log-probabilities are not those of the policy's starting weights ({describe(stored)}); the "
        "cache is stale or damaged: delete it, or set another reference.cache_dir"
    ]


def blame_layout(
    unshared: Sequence[float], lonely: Sequence[float], packed: Sequence[float], bins: Sequence[float]
) -> list[str]:
    """The fault of the layouts, from differences in units of honest noise; equal on every rank.

    Args:
        unshared: completions with a prompt each, against the micro-batch.
        lonely: completions alone, against the micro-batch.
        packed: completions alone, against those with a prompt each.
        bins: the reference's bins, against its answer for the micro-batch.
    """
    if not is_rounding(packed) or (not packed and not is_rounding(lonely)):
        return [
            f"packing: a completion in a micro-batch scores differently than alone ({describe(packed or lonely)}): "
            "scored positions, targets, or the border between sequences. model.attn_implementation=sdpa rules out the "
            "kernel"
        ]
    if not is_rounding(unshared) or not is_rounding(lonely):
        return [
            f"attention: with a shared prompt completions score differently than without "
            f"({describe([*unshared, *lonely])}): the kernel is wrong, or the keys or positions given to it. "
            "model.prefix_sharing=off or "
            "model.attn_implementation=sdpa avoid it"
        ]
    if not is_rounding(bins):
        return [
            f"packing: the reference's bins score differently than the policy's micro-batches ({describe(bins)}): "
            "values are assigned to the wrong completions, or depend on what is packed with them"
        ]
    return []


def blame_own_forward(excess: Mapping[str, Sequence[float]], settings: Sequence[str] = ()) -> list[str]:
    """The fault of an architecture that computes more than the packed forward knows of.

    Args:
        excess: of policy and reference, their own forward against the packed one.
        settings: by which layers compute in another way than their classes say.
    """
    way_out = "a model of this architecture cannot be trained here"
    if settings:
        way_out = f"its layers are computed as {' and '.join(settings)} says, its own forward is not: try without"
    return [
        f"architecture: the packed forward of the {name} does not give the log-probabilities of its architecture's own "
        f"forward ({describe(found)}); {way_out}"
        for name, found in excess.items()
        if not is_rounding(found)
    ]


def raise_first(faults: list[str]) -> None:
    """Stop every rank if any has found a fault. Collective.

    Raises:
        NumericsError: the first fault in rank order.
    """
    for rank, theirs in enumerate(all_gather_json(faults)):
        if theirs:
            raise NumericsError(f"self-check failed on rank {rank}: {theirs[0]}")
