"""log pi(token given prefix), and statistics of the distribution it is of, without keeping the logits.

    M scored tokens   m tokens of one chunk   D model dimension   V vocabulary   K statistics

The head is a module that owns `lm_head`'s parameter, so that ZeRO-3's hooks gather and prefetch it; reading
`lm_head.weight` from outside would see an empty tensor. Logits exist for one chunk of tokens at a time, in forward and
again in backward; where one chunk is all there is, its probabilities are kept for backward instead.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dpo_dist.pointwise import AS_WRITTEN, STATISTICS, LogitTransform, Pointwise

CHUNK_TOKENS = 2048  # a chunk of float32 logits of a 128k vocabulary is 1 GiB


@dataclass(frozen=True, eq=False)
class TokenScores:
    """What the policy says of every scored token."""

    logps_M: Float[Tensor, " M"]  # nats
    statistics_KM: Float[Tensor, "K M"]  # without gradient
    names: tuple[str, ...] = ()  # of the K statistics, out of `pointwise.STATISTICS`

    def of(self, name: str) -> Float[Tensor, " M"]:
        """One of the statistics."""
        return self.statistics_KM[self.names.index(name)]


class LogProbHead(nn.Module):
    """The output head: log-probabilities of targets, or the stock logits when there are none.

    Args:
        linear: the model's own `lm_head`; its parameters are taken over, names and tying included.
        transform: logit scale and final softcap of the architecture.
        chunk_tokens: scored tokens whose logits exist at the same time.
        fused: what computes on logits, compiled; None: as single operations.
    """

    def __init__(
        self,
        linear: nn.Linear,
        transform: LogitTransform,
        chunk_tokens: int = CHUNK_TOKENS,
        fused: Pointwise | None = None,
    ) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.transform = transform
        self.chunk_tokens = chunk_tokens
        self.fused = fused if self.bias is None else None  # a bias has its gradient from float32 sums of the logits'

    def forward(
        self, hidden: Tensor, targets_M: Int[Tensor, " M"] | None = None, statistics: Sequence[str] = ()
    ) -> Tensor | tuple[Float[Tensor, " M"], Float[Tensor, "K M"]]:
        """Token log-probabilities in nats, float32, of `targets_M` given `hidden` (M, D); or logits (..., V).

        Equals:
            torch.log_softmax(transform((hidden @ weight.T + bias).float()), -1)[range(M), targets]

        Args:
            hidden: the decoder's last hidden states.
            targets_M: which token's log-probability is asked for.
            statistics: names out of `pointwise.STATISTICS`. With some, the log-probabilities come with their values in
                the order of the names, which have no gradient and are float32, too. They are taken from the same
                logits.
        """
        if targets_M is None:
            assert not statistics, "logits come alone"
            return F.linear(hidden, self.weight, self.bias)
        assert set(statistics) <= set(STATISTICS), statistics
        is_one_chunk = len(hidden) <= self.chunk_tokens
        if self.fused is not None and len(hidden) > 1:  # torch compiles anew for one row, and nothing is gained there
            return _FusedLogProbs.apply(
                hidden, self.weight, targets_M, self.transform, self.chunk_tokens, tuple(statistics),
                torch.is_grad_enabled() and is_one_chunk, self.fused,
            )  # fmt: skip
        # A softcap's gradient needs the logits, which cannot be had back from probabilities that underflowed.
        keeps = torch.is_grad_enabled() and is_one_chunk and self.transform.softcap is None
        return _ChunkedLogProbs.apply(
            hidden, self.weight, self.bias, targets_M, self.transform, self.chunk_tokens, tuple(statistics), keeps
        )

    @torch.no_grad()
    def compile_statistics(self, names: tuple[str, ...], dtype: torch.dtype, device: torch.device) -> None:
        """Have these compiled now, if they are to be: later, in the middle of a run, all ranks would wait for one."""
        if self.fused is None:
            return
        vocabulary = getattr(self.weight, "ds_shape", self.weight.shape)[0]
        logits_mV, targets_m = torch.zeros(2, vocabulary, dtype=dtype, device=device), torch.arange(2, device=device)
        lse_m, _ = self.fused.log_probs(logits_mV, targets_m, self.transform)
        self.fused.statistics(logits_mV, targets_m, lse_m, self.transform, names)


class _ChunkedLogProbs(torch.autograd.Function):
    """log softmax(transform(h W^T + b))[target], chunk by chunk; the logits of several are recomputed in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Float[Tensor, "M D"],
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_M: Int[Tensor, " M"],
        transform: LogitTransform,
        chunk_tokens: int,
        names: tuple[str, ...],
        keeps: bool,
    ) -> Float[Tensor, " M"] | tuple[Float[Tensor, " M"], Float[Tensor, "K M"]]:
        precision = torch.promote_types(hidden_MD.dtype, torch.float32)
        logps_M, lse_M = (hidden_MD.new_empty(len(hidden_MD), dtype=precision) for _ in range(2))
        statistics_KM = logps_M.new_empty(len(names), len(logps_M))
        ctx.probs_MV = probs_mV = None
        for chunk in _chunks(len(hidden_MD), chunk_tokens):
            logits_mV = transform(F.linear(hidden_MD[chunk], weight_VD, bias_V).to(precision))
            lse_M[chunk] = logits_mV.logsumexp(-1)
            logps_M[chunk] = logits_mV.gather(-1, targets_M[chunk, None])[:, 0] - lse_M[chunk]
            if keeps:
                ctx.probs_MV = probs_mV = (logits_mV - lse_M[chunk, None]).exp_()
            if names:
                statistics_KM[:, chunk] = _take_statistics(names, logits_mV, targets_M[chunk], lse_M[chunk], probs_mV)
        ctx.save_for_backward(hidden_MD, targets_M, lse_M)
        # The parameters themselves, not saved tensors: ZeRO-3 has released the data by now and gathers it into the
        # same objects before backward.
        ctx.weight, ctx.bias, ctx.transform, ctx.chunk_tokens = weight_VD, bias_V, transform, chunk_tokens
        if not names:
            return logps_M
        ctx.mark_non_differentiable(statistics_KM)
        return logps_M, statistics_KM

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden_MD, targets_M, lse_M = ctx.saved_tensors

        def grad_of(chunk: slice) -> Tensor:
            return _grad_logits(ctx, chunk, hidden_MD, targets_M, lse_M, grad_outputs[0])

        return (*_gradients(ctx, hidden_MD, lse_M.dtype, ctx.needs_input_grad[:3], grad_of), *(None,) * 5)


class _FusedLogProbs(torch.autograd.Function):
    """The same by compiled functions, which read logits in the model's precision; one chunk's are kept for backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Float[Tensor, "M D"],
        weight_VD: Tensor,
        targets_M: Int[Tensor, " M"],
        transform: LogitTransform,
        chunk_tokens: int,
        names: tuple[str, ...],
        keeps: bool,
        fused: Pointwise,
    ) -> Float[Tensor, " M"] | tuple[Float[Tensor, " M"], Float[Tensor, "K M"]]:
        ctx.logits_MV, found = None, []
        for chunk in _chunks(len(hidden_MD), chunk_tokens):
            # Copies: of a view torch would also compile for the length of what it is a part of.
            logits_mV, targets_m = F.linear(hidden_MD[chunk], weight_VD), targets_M[chunk].clone()
            functions = _for_rows(fused, len(targets_m))
            lse_m, logps_m = functions.log_probs(logits_mV, targets_m, transform)
            values = (functions.statistics(logits_mV, targets_m, lse_m, transform, names),) if names else ()
            found.append((lse_m, logps_m, *values))
            if keeps:
                ctx.logits_MV = logits_mV
        lse_M, logps_M, *statistics = (torch.cat(parts, -1) for parts in zip(*found, strict=True))
        ctx.save_for_backward(hidden_MD, targets_M, lse_M)
        ctx.weight, ctx.bias, ctx.transform, ctx.chunk_tokens = weight_VD, None, transform, chunk_tokens
        ctx.fused = fused
        if not names:
            return logps_M
        ctx.mark_non_differentiable(statistics[0])
        return logps_M, statistics[0]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden_MD, targets_M, lse_M = ctx.saved_tensors
        kept_MV, ctx.logits_MV = ctx.logits_MV, None

        def grad_of(chunk: slice) -> Tensor:
            logits_mV = F.linear(hidden_MD[chunk], ctx.weight) if kept_MV is None else kept_MV
            function = _for_rows(ctx.fused, len(logits_mV)).grad_logits
            parts = (whole_M[chunk].clone() for whole_M in (targets_M, lse_M, grad_outputs[0]))
            return function(logits_mV, *parts, ctx.transform)

        needs = (*ctx.needs_input_grad[:2], False)
        grad_hidden_MD, grad_weight_VD, _ = _gradients(ctx, hidden_MD, lse_M.dtype, needs, grad_of)
        return (grad_hidden_MD, grad_weight_VD, *(None,) * 6)


def _for_rows(fused: Pointwise, count: int) -> Pointwise:
    """torch compiles anew for a single row: a last chunk may have no more."""
    return fused if count > 1 else AS_WRITTEN


def _gradients(
    ctx: Any,
    hidden_MD: Tensor,
    precision: torch.dtype,
    needs: Sequence[bool],
    grad_of: Callable[[slice], Float[Tensor, "m V"]],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden states, weight and bias, where they are needed, from that of each chunk's logits."""
    needs_hidden, needs_weight, needs_bias = needs
    weight_VD = ctx.weight
    grad_hidden_MD = torch.empty_like(hidden_MD)
    # float32 sums: in bfloat16 the rounding of every chunk would add up to a bias.
    grad_weight_VD: Tensor | None = None
    grad_bias_V = torch.zeros_like(ctx.bias, dtype=precision) if needs_bias else None
    for chunk in _chunks(len(hidden_MD), ctx.chunk_tokens):
        grad_mV = grad_of(chunk)
        if grad_bias_V is not None:
            grad_bias_V += grad_mV.sum(0)
        if needs_weight:
            # The product in the model's dtype (tensor cores), the sum over chunks in float32.
            product_VD = grad_mV.to(hidden_MD.dtype).t() @ hidden_MD[chunk]
            grad_weight_VD = product_VD.to(precision) if grad_weight_VD is None else grad_weight_VD.add_(product_VD)
        if needs_hidden:
            grad_hidden_MD[chunk] = grad_mV.to(hidden_MD.dtype) @ weight_VD
    if needs_weight and grad_weight_VD is None:
        grad_weight_VD = torch.zeros_like(weight_VD)  # nothing is scored
    return (
        grad_hidden_MD if needs_hidden else None,
        None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype),
        None if grad_bias_V is None else grad_bias_V.to(ctx.bias.dtype),
    )


def _take_statistics(
    names: tuple[str, ...],
    logits_mV: Float[Tensor, "m V"],
    targets_m: Int[Tensor, " m"],
    lse_m: Float[Tensor, " m"],
    probs_mV: Float[Tensor, "m V"] | None,
) -> Float[Tensor, "K m"]:
    """Statistics of a chunk. They overwrite the logits, and take as much memory once more, as logsumexp did.

    Probabilities that are there already are taken, and left alone.
    """
    found = {}
    if "mean_logit" in names:
        found["mean_logit"] = logits_mV.mean(-1)
    if "is_top1" in names:
        found["is_top1"] = (logits_mV.argmax(-1) == targets_m).to(lse_m.dtype)
    if {"entropy", "log_sum_sq_probs"} & set(names):
        log_probs_mV = logits_mV.sub_(lse_m[:, None])
        probs_mV = log_probs_mV.exp() if probs_mV is None else probs_mV
        # Not quite 1: lse is rounded, by more than all else together where logits are far from 0.
        total_m = probs_mV.sum(-1)
        if "entropy" in names:
            found["entropy"] = total_m.log() - log_probs_mV.mul_(probs_mV).sum(-1) / total_m
        if "log_sum_sq_probs" in names:
            # Squares that underflow do not count: the sum is at least 1 / V.
            squares_mV = torch.mul(probs_mV, probs_mV, out=log_probs_mV)
            found["log_sum_sq_probs"] = squares_mV.sum(-1).log_() - 2.0 * total_m.log()
    return torch.stack([found[name] for name in names])


def _grad_logits(
    ctx: Any, chunk: slice, hidden_MD: Tensor, targets_M: Tensor, lse_M: Tensor, grad_M: Tensor
) -> Float[Tensor, "m V"]:
    """d loss / d logits of a chunk: grad * (one_hot(target) - softmax), through the logit transform."""
    transformed_mV, probs_mV, ctx.probs_MV = None, ctx.probs_MV, None  # overwritten: a second backward computes it anew
    if probs_mV is None:
        transformed_mV = ctx.transform(F.linear(hidden_MD[chunk], ctx.weight, ctx.bias).to(lse_M.dtype))
        probs_mV = (transformed_mV - lse_M[chunk, None]).exp_()
    grad_mV = probs_mV.neg_()
    grad_mV.scatter_add_(1, targets_M[chunk, None], grad_mV.new_ones(len(grad_mV), 1))
    grad_mV *= grad_M[chunk, None].to(grad_mV.dtype)
    return ctx.transform.gradient(grad_mV, transformed_mV)


def _chunks(total: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, total, size)]
