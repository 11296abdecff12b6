"""The configured objective: a sum of losses, each with its factor and its settings."""

from collections.abc import Callable

import torch
from torch import Tensor

from dpo_dist.config import LossConfig
from dpo_dist.losses.divergences import scores
from dpo_dist.losses.table import LOSSES, LossSpec
from dpo_dist.losses.values import PairValues

PairLoss = Callable[[PairValues], Tensor]


def bind(config: LossConfig) -> PairLoss:
    """The configured losses as one function: what pairs are worth -> the loss of each pair, (B,)."""
    terms = [
        (weight, _bound(LOSSES[name], config)) for name, weight in zip(config.loss_types, config.weights, strict=True)
    ]

    def loss(pairs: PairValues) -> Tensor:
        given = {
            **vars(pairs),
            "chosen_scores": scores(config, pairs.chosen_logratios),
            "rejected_scores": scores(config, pairs.rejected_logratios),
        }
        return sum((weight * term(given) for weight, term in terms), torch.zeros_like(pairs.chosen_logratios))

    return loss


def at_equality(loss: PairLoss) -> float:
    """The closed form of a pair's loss where policy and reference are the same weights: log 2 for `sigmoid`."""
    return float(loss(_alike(torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))))


def near_equality(loss: PairLoss, noise: float) -> float:
    """How far the loss of a pair may be from its closed form if its two log-ratios together are off by so many nats.

    Together: the noise of a margin, chosen - rejected, is at most that, and so is the noise of either.
    """
    ends = noise * torch.tensor([(1, 0), (-1, 0), (0, 1), (0, -1)], dtype=torch.float64)
    return float((loss(_alike(ends[:, 0], ends[:, 1])) - at_equality(loss)).abs().max())


def _alike(chosen: Tensor, rejected: Tensor) -> PairValues:
    """Pairs of one token each: where a loss divides by lengths, none is further from its closed form."""
    return PairValues(chosen, rejected, torch.ones_like(chosen), torch.ones_like(chosen))


def _bound(spec: LossSpec, config: LossConfig) -> Callable[[dict[str, Tensor]], Tensor]:
    settings = {name: getattr(config, name) for name in spec.parameters}
    return lambda given: spec.fn(*(given[name] for name in spec.needs), **settings)
