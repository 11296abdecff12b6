"""The configured objective: a sum of losses, each with its factor, its settings and its unit."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dpo_dist.batch import MicroBatch
from dpo_dist.config import LossConfig
from dpo_dist.logprobs import TokenScores
from dpo_dist.losses.divergences import scores
from dpo_dist.losses.table import LOSSES, UNITS, LossSpec
from dpo_dist.losses.values import PairValues
from dpo_dist.losses.weighting import wpo_weights

Term = Callable[[Mapping[str, Any]], Tensor]


@dataclass(frozen=True)
class Objective:
    """The losses of a configuration as one function."""

    config: LossConfig
    terms: Mapping[str, tuple[tuple[float, Term], ...]]  # of each of `UNITS`

    @property
    def needs_matching(self) -> bool:
        """Whether any of them compares the pairs of a whole step with each other; see `matching.py`."""
        return any(LOSSES[name].needs_matching for name in self.config.loss_types)

    def needs(self, value: str) -> bool:
        """Whether any of them is called with `value`."""
        return any(value in LOSSES[name].needs for name in self.config.loss_types)

    @property
    def statistics(self) -> tuple[str, ...]:
        """What every forward must give beside log-probabilities (`logprobs.STATISTICS`)."""
        return ("log_sum_sq_probs",) if self.config.use_weighting else ()

    def __call__(
        self,
        batch: MicroBatch,
        logps_C: Float[Tensor, " C"],
        logratios_C: Float[Tensor, " C"],
        tokens: TokenScores | None = None,
    ) -> Float[Tensor, " U"]:
        """The sums of weight * loss over a micro-batch, one for each of `UNITS`; see `mean_loss`.

        Args:
            batch: which completions are chosen and rejected, and the weights of pairs.
            logps_C: log pi_policy of every completion, nats.
            logratios_C: the same less log pi_reference.
            tokens: of which `logps_C` are the sums, with `statistics`; WPO alone needs them.
        """
        pair_values = PairValues.of(batch, logps_C, logratios_C)
        pairs = self.pair_losses(pair_values)
        if self.config.use_weighting:
            assert tokens is not None, "WPO weighs by tokens"
            pairs = pairs * wpo_weights(batch, tokens)
        demonstrations = _added(self.terms["token"], {"completion_logps": logps_C}, logps_C)
        lists = _added(
            self.terms["example"],
            {**vars(pair_values), "pair_chosen": batch.pair_chosen_B, "completion_logps": logps_C},
            logps_C,
        )
        rated = _added(
            self.terms["completion"],
            {
                "completion_logratios": logratios_C,
                "ratings": batch.rating_C.to(logratios_C.dtype),
                "kl_baseline": batch.kl_baseline,
                "reward_baseline": batch.reward_baseline,
            },
            logps_C,
        )
        weighted = (
            pairs * batch.pair_weight_B,
            demonstrations * batch.chosen_weight_C,
            lists * batch.example_weight_C,
            rated * batch.example_weight_C,
        )
        return torch.stack([values.sum() for values in weighted])

    def pair_losses(self, pairs: PairValues) -> Float[Tensor, " B"]:
        """What belongs to pairs, of each pair."""
        config = self.config
        given = {
            **vars(pairs),
            "chosen_scores": scores(config, pairs.chosen_logratios),
            "rejected_scores": scores(config, pairs.rejected_logratios),
        }
        return _added(self.terms["pair"], given, pairs.chosen_logratios)


def bind(config: LossConfig) -> Objective:
    """The configured losses as one function."""
    terms: dict[str, list[tuple[float, Term]]] = {unit: [] for unit in UNITS}
    for name, weight in zip(config.loss_types, config.weights, strict=True):
        spec = LOSSES[name]
        terms[spec.unit].append((weight, _bound(spec, config)))
        likelihood = getattr(config, spec.likelihood) if isinstance(spec.likelihood, str) else spec.likelihood
        if likelihood:
            terms["token"].append((weight * likelihood, _bound(LOSSES["sft"], config)))
    return Objective(config, {unit: tuple(of_unit) for unit, of_unit in terms.items()})


def mean_loss(sums_U: Tensor, weights: Sequence[float]) -> Tensor:
    """The loss of a step or a set, or a micro-batch's part in it: every unit's sum by the weight of all of its kind.

    Args:
        sums_U: as from `Objective`.
        weights: `StepPlan.weights`.
    """
    parts = [part / weight for part, weight in zip(sums_U, weights, strict=True) if weight]
    return torch.stack([sums_U.new_zeros(()), *parts]).sum()


def at_equality(objective: Objective) -> float:
    """The closed form of the loss where policy and reference are the same weights: log 2 for `sigmoid`.

    NaN where it depends on what the policy itself finds likely, or on the data: lengths, margins, ranks.
    """
    config = objective.config
    of_pairs = all(LOSSES[name].reads_a_reference and LOSSES[name].unit == "pair" for name in config.loss_types)
    if not of_pairs or config.rdpo_alpha or config.odpo_alpha or config.use_weighting:
        return math.nan
    zero = torch.zeros(1, dtype=torch.float64)
    return float(objective.pair_losses(_alike(zero, zero)))


def near_equality(objective: Objective, noise: float) -> float:
    """How far the loss of a pair may be from its closed form if its two log-ratios together are off by so many nats.

    Together: the noise of a margin, chosen - rejected, is at most that, and so is the noise of either.
    """
    ends = noise * torch.tensor([(1, 0), (-1, 0), (0, 1), (0, -1)], dtype=torch.float64)
    moved = objective.pair_losses(_alike(ends[:, 0], ends[:, 1]))
    return float((moved - at_equality(objective)).abs().max())


def _alike(chosen: Tensor, rejected: Tensor) -> PairValues:
    """Pairs of one token each: where a loss divides by lengths, none is further from its closed form."""
    one, zero = torch.ones_like(chosen), torch.zeros_like(chosen)
    return PairValues(chosen, rejected, one, one, chosen, rejected, zero, one, zero, rejected, chosen)


def _added(terms: Sequence[tuple[float, Term]], given: Mapping[str, Any], like: Tensor) -> Tensor:
    return sum((weight * term(given) for weight, term in terms), torch.zeros_like(like))


def _bound(spec: LossSpec, config: LossConfig) -> Term:
    accepted = inspect.signature(spec.fn).parameters
    settings = {name: getattr(config, name) for name in spec.parameters if name in accepted}
    return lambda given: spec.fn(*(given[name] for name in spec.needs), **settings)
