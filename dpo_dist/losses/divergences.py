"""f-divergences: what takes the place of the log-ratio when another one than reverse KL holds the policy.

Wang et al. 2023, "Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence Constraints",
arXiv:2309.16240, table 1: the reward of a completion is beta f'(u) + const, u = pi_policy / pi_reference. Every tensor
is (B,), one value per pair; log-ratios are log u, in nats.
"""

import math
from collections.abc import Callable

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dpo_dist.config import LossConfig

_LARGEST_EXPONENT = 80.0  # exp of more is not finite in float32; TRL's bound


def reverse_kl(logratios: Float[Tensor, " B"], alpha: float) -> Float[Tensor, " B"]:
    """f(u) = u log u: f'(u) = log u, up to a constant that cancels. Plain DPO."""
    return logratios


def forward_kl(logratios: Float[Tensor, " B"], alpha: float) -> Float[Tensor, " B"]:
    """f(u) = -log u: f'(u) = -1/u, here 1 - 1/u, which is 0 at u = 1."""
    return -(-logratios).expm1()


def js_divergence(logratios: Float[Tensor, " B"], alpha: float) -> Float[Tensor, " B"]:
    """f(u) = u log u - (u + 1) log((u + 1) / 2): f'(u) = log(2u / (u + 1))."""
    return math.log(2) + F.logsigmoid(logratios)


def alpha_divergence(logratios: Float[Tensor, " B"], alpha: float) -> Float[Tensor, " B"]:
    """f'(u) = (u^(alpha - 1) - 1) / (alpha - 1), TRL's sign: alpha = 1 is reverse KL, alpha = 0 forward KL.

    The paper's table writes (1 - u^-alpha) / alpha: its alpha is 1 - ours.
    """
    power = alpha - 1.0
    if abs(power) < 1e-6:
        return logratios
    return (power * logratios).clamp(max=_LARGEST_EXPONENT).expm1() / power


DIVERGENCES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "js_divergence": js_divergence,
    "alpha_divergence": alpha_divergence,
}


def scores(config: LossConfig, logratios: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """f'(u) of the configured divergence."""
    return DIVERGENCES[config.f_divergence_type](logratios, config.f_alpha_divergence_coef)
