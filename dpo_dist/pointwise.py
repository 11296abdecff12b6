"""What the output head does beside its matrix products, as functions that a compiler fuses.

    m tokens of one chunk   V vocabulary   K statistics

They take logits as the matrix product gave them, in its precision, and read them once or twice, where the same written
as single operations (`logprobs.py`) reads and writes float32 copies of them many times.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Of the distribution p of the next token, with z the transformed logits:
#   entropy           -sum_v p_v log p_v, nats; log V where p is uniform
#   mean_logit        sum_v z_v / V
#   is_top1           1 where the target is argmax_v z_v, the first of equals as in TRL's accuracy; else 0
#   log_sum_sq_probs  log sum_v p_v^2; -log V where p is uniform, 0 where it is certain (arXiv:2406.11827, eq. 2)
STATISTICS = ("entropy", "mean_logit", "is_top1", "log_sum_sq_probs")


@dataclass(frozen=True)
class LogitTransform:
    """What an architecture does between the last matrix product and the softmax."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """logits -> softcap * tanh(scale * logits / softcap)."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def gradient(self, grad: Tensor, transformed: Tensor | None) -> Tensor:
        """d loss / d logits from that by transformed logits, and these where there is a softcap."""
        if self.softcap is not None:
            assert transformed is not None
            grad = grad * (1.0 - (transformed / self.softcap) ** 2)
        return grad * self.scale if self.scale != 1.0 else grad


def log_probs(
    logits_mV: Float[Tensor, "m V"], targets_m: Int[Tensor, " m"], transform: LogitTransform
) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"]]:
    """log sum_v exp z_v, and z_target less that, nats; float32 or better."""
    z_mV = transform(logits_mV.to(torch.promote_types(logits_mV.dtype, torch.float32)))
    lse_m = z_mV.logsumexp(-1)
    return lse_m, z_mV.gather(-1, targets_m[:, None])[:, 0] - lse_m


def grad_logits(
    logits_mV: Float[Tensor, "m V"],
    targets_m: Int[Tensor, " m"],
    lse_m: Float[Tensor, " m"],
    grad_m: Float[Tensor, " m"],
    transform: LogitTransform,
) -> Float[Tensor, "m V"]:
    """d loss / d logits: grad * (one_hot(target) - softmax z), through the transform; in the logits' precision."""
    z_mV = transform(logits_mV.to(lse_m.dtype))
    is_target_mV = torch.arange(z_mV.shape[1], device=z_mV.device) == targets_m[:, None]
    grad_mV = (is_target_mV.to(z_mV.dtype) - (z_mV - lse_m[:, None]).exp()) * grad_m[:, None].to(z_mV.dtype)
    return transform.gradient(grad_mV, z_mV).to(logits_mV.dtype)


def statistics(
    logits_mV: Float[Tensor, "m V"],
    targets_m: Int[Tensor, " m"],
    lse_m: Float[Tensor, " m"],
    transform: LogitTransform,
    names: tuple[str, ...],
) -> Float[Tensor, "K m"]:
    """`STATISTICS` of those names."""
    z_mV = transform(logits_mV.to(lse_m.dtype))
    log_p_mV = z_mV - lse_m[:, None]
    p_mV = log_p_mV.exp()
    total_m = p_mV.sum(-1)  # not quite 1: lse is rounded
    found = {
        "entropy": lambda: total_m.log() - (log_p_mV * p_mV).sum(-1) / total_m,
        "mean_logit": lambda: z_mV.mean(-1),
        "is_top1": lambda: (z_mV.argmax(-1) == targets_m).to(lse_m.dtype),
        "log_sum_sq_probs": lambda: (p_mV * p_mV).sum(-1).log() - 2.0 * total_m.log(),
    }
    return torch.stack([found[name]() for name in names])


@dataclass(frozen=True)
class Pointwise:
    """These functions, compiled or as they are."""

    log_probs: Callable[..., tuple[Tensor, Tensor]] = log_probs
    grad_logits: Callable[..., Tensor] = grad_logits
    statistics: Callable[..., Tensor] = statistics

    def compiled(self, compiler: Callable[[Callable[..., Any]], Callable[..., Any]]) -> "Pointwise":
        """By what gives a function back compiled."""
        # Without the checks of types that tests put around them.
        return Pointwise(
            *(compiler(inspect.unwrap(one)) for one in (self.log_probs, self.grad_logits, self.statistics))
        )


AS_WRITTEN = Pointwise()
