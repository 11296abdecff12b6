"""Preference losses: pure functions of log-ratios, in one visible table.

A log-ratio is log pi_policy - log pi_reference of one completion, in nats. Every tensor is (B,), one value per pair.
A loss knows nothing of weights, batches or ranks: whoever calls it multiplies by the pairs' weights and divides by the
weight of the whole step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dpo_dist.config import LossConfig

PairLoss = Callable[..., Tensor]


def sigmoid(
    chosen_logratios: Float[Tensor, " B"],
    rejected_logratios: Float[Tensor, " B"],
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Float[Tensor, " B"]:
    """-(1 - eps) log sigmoid(margin) - eps log sigmoid(-margin), margin = beta (chosen - rejected log-ratio).

    Args:
        chosen_logratios: of the preferred completion, nats.
        rejected_logratios: of the other one, nats.
        beta: how strongly the policy is held to the reference; > 0.
        label_smoothing: eps, the probability that a label is flipped; 0 is plain DPO, above it is conservative DPO.

    Returns:
        Loss of each pair, nats, > 0; log(2) where the policy equals the reference.

    Source:
        Rafailov et al. 2023, arXiv:2305.18290, eq. 7; with label smoothing Mitchell 2023, "A note on DPO with noisy
        preferences & relationship to IPO", eq. 3.
    """
    margins = beta * (chosen_logratios - rejected_logratios)
    return -(1.0 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)


@dataclass(frozen=True)
class LossSpec:
    """A loss, what one value of it belongs to, and which settings it takes."""

    fn: PairLoss
    unit: Literal["pair"]
    parameters: tuple[str, ...]  # fields of `loss` in the configuration, bound by name


LOSSES: dict[str, LossSpec] = {
    "sigmoid": LossSpec(sigmoid, unit="pair", parameters=("beta", "label_smoothing")),
}


def bind(config: LossConfig) -> PairLoss:
    """The configured loss as a function of (chosen log-ratios, rejected log-ratios)."""
    spec = LOSSES[config.loss_type]
    settings = {name: getattr(config, name) for name in spec.parameters}

    def loss(chosen_logratios: Tensor, rejected_logratios: Tensor) -> Tensor:
        return spec.fn(chosen_logratios, rejected_logratios, **settings)

    return loss


def at_equality(loss: PairLoss) -> float:
    """The closed form of a pair's loss where policy and reference are the same weights: log 2 for `sigmoid`."""
    zero = torch.zeros(1, dtype=torch.float64)
    return float(loss(zero, zero))
