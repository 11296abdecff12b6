"""What a run proves about itself before the first update.

With equal weights and the same micro-batch, policy and reference must agree to the last bit, in any dtype: the same
kernels ran on the same numbers. A different layout of the same examples sums in another order, so it agrees up to
rounding: that noise is measured and held against what honest arithmetic of the dtype gives. Where something is off, the
run stops and says which of dtype, dropout, reference, attention or packing is at fault.

    M scored tokens   C completions   B preference pairs
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dpo_dist.batch import AttentionLayout, MicroBatch, RankWork, build_micro_batch
from dpo_dist.distributed import all_gather_json, require_agreement
from dpo_dist.engine import TrainingEngine
from dpo_dist.errors import NumericsError
from dpo_dist.losses import PairLoss, at_equality
from dpo_dist.packing import StepPlan
from dpo_dist.reference import LiveReference
from dpo_dist.tokenization import TokenizedExample

# How far two honest evaluations of one completion's log-probability are apart (rms), in nats per sqrt(token). Measured:
# docs/decisions/0003-self-check-bounds.md says what, and how to measure it again.
NOISE_PER_SQRT_TOKEN = {torch.bfloat16: 0.03, torch.float16: 0.004, torch.float32: 1e-5, torch.float64: 1e-12}
# Adding n equal values up in float32 rounds n times: two such sums with independent roundings differ by 0.3 sqrt(n)
# roundings of the total. In float32 this is the larger part from about 100 tokens on.
_SUM_NOISE = 0.3 * torch.finfo(torch.float32).eps
_RMS_LIMIT = 3.0  # times the honest noise, of all completions that are compared
_LARGEST_LIMIT = 8.0  # times the honest noise, of a single one


@dataclass(frozen=True)
class Proof:
    """What was measured; equal on every rank."""

    same_weights: bool  # policy and reference started from the same folder
    layout_noise: float  # rms over completions, nats per sqrt(token): unshared, and alone, against the micro-batch
    margin_noise: float  # rms over pairs of chosen - rejected difference, nats: reference bins against micro-batches
    margin_bound: float  # the same for honest arithmetic of this dtype and these lengths, an upper bound

    def lines(self) -> list[str]:
        """What to tell the user."""
        agreement = "agree bitwise" if self.same_weights else "skipped: reference differs"
        return [
            f"self-check: policy and reference on the same micro-batch: {agreement}",
            f"self-check: other layouts of the same examples differ by {self.layout_noise:.1e} nats per sqrt(token)",
            f"self-check: margin noise {self.margin_noise:.1e} nats (bound {self.margin_bound:.1e})",
        ]


@dataclass(frozen=True)
class Comparison:
    """Two evaluations of the same completions, on one rank."""

    difference_C: Float[Tensor, " C"]  # nats, float64, on CPU
    honest_C: Float[Tensor, " C"]  # nats: what rounding explains (rms)
    lengths_C: Float[Tensor, " C"]  # tokens

    def excess(self) -> list[float]:
        """Differences of all ranks in units of honest noise. Collective."""
        return _gather(self.difference_C / self.honest_C)

    def per_root_token(self) -> list[float]:
        """Differences of all ranks in nats per sqrt(token). Collective."""
        return _gather(self.difference_C / self.lengths_C.sqrt())


@torch.no_grad()
def prove(
    policy: TrainingEngine,
    reference: LiveReference,
    work: RankWork,
    plan: StepPlan,
    same_weights: bool,
    max_tokens: int,
) -> Proof:
    """Compare engines and layouts on the first micro-batch of every rank. Collective: every rank must call it.

    Args:
        policy: before its first update.
        reference: live.
        work: this rank's share of the first step.
        plan: the first step.
        same_weights: whether both engines were loaded from the same folder in the same dtype.
        max_tokens: budget of a forward without gradient.

    Raises:
        NumericsError: on every rank, naming the part at fault.
    """
    scale, faults = NOISE_PER_SQRT_TOKEN[policy.dtype], []
    positions = plan.micro_batches[policy.ranks.rank][0]
    batch = work.build(positions, work.share_prompts)
    logps_M = policy.token_logps(batch)
    if not torch.equal(logps_M, policy.token_logps(batch)):
        faults.append("dropout: the policy gives two answers for one micro-batch; dropout or a random layer is active")
    reference_logps_M = reference.engine.token_logps(batch)
    if same_weights and not torch.equal(logps_M, reference_logps_M):
        faults.append(_blame_reference(policy, reference, logps_M, reference_logps_M))

    # Other layouts of the same examples. Every rank runs equally many forwards, with fillers where it has nothing.
    logps_C = _sums(batch, logps_M)
    own_prompts = work.build(_within(work, positions, max_tokens), share_prompts=False)
    others = [own_prompts, *_two_alone(work, batch, positions)]
    unshared, *alone = [_compare(one, _sums(one, policy.token_logps(one)), batch, logps_C, scale) for one in others]
    reference_C = reference.completion_logps(work.reference_bins(), work.num_completions)
    in_bins_C = reference_C[batch.completion_index_C.to(reference_C.device)]
    bins = _compare(batch, in_bins_C, batch, _sums(batch, reference_logps_M), scale)
    faults += _blame_layout(unshared.excess(), [x for one in alone for x in one.excess()], bins.excess())
    _raise_first(faults)

    margins_B = bins.difference_C[batch.pair_chosen_B] - bins.difference_C[batch.pair_rejected_B]
    return Proof(
        same_weights,
        layout_noise=_rms([x for one in (unshared, *alone) for x in one.per_root_token()]),
        margin_noise=_rms(_gather(margins_B)),
        margin_bound=_RMS_LIMIT * _rms(_gather(_honest_margins(work, reference_C, scale))),
    )


def check_first_loss(measured: float, loss: PairLoss, proof: Proof) -> str:
    """Hold the first step's mean loss against its closed form; returns what to tell the user.

    Raises:
        NumericsError: the loss is off by more than the noise of the margins explains.
    """
    expected = at_equality(loss)
    if not proof.same_weights:
        return "self-check: first loss: skipped: reference differs"
    ends = torch.tensor([proof.margin_bound, -proof.margin_bound], dtype=torch.float64)
    tolerance = float((loss(ends, torch.zeros_like(ends)) - expected).abs().max()) + 1e-6
    if abs(measured - expected) > tolerance:
        raise NumericsError(
            f"self-check: first loss is {measured:.6f}; policy and reference are the same weights, so it must be "
            f"{expected:.6f} within {tolerance:.1e}: reference log-probabilities do not belong to these completions"
        )
    return f"self-check: first loss {measured:.6f} equals its closed form {expected:.6f} within {tolerance:.1e}"


def check_agreement(plan: StepPlan, data_fingerprint: str, config_hash: str) -> None:
    """Every rank must be about to compute the same step of the same run.

    Raises:
        RankMismatchError: on every rank, naming what differs.
    """
    require_agreement("the configuration", config_hash)
    require_agreement("the training data", data_fingerprint)
    require_agreement("the first step's plan", plan.fingerprint)


def alone(example: TokenizedExample, k: int, index: int) -> MicroBatch:
    """Completion k of an example as one plain causal sequence.

    Written out here and not by `batch.py`, so that a mistake there cannot stand on both sides of a comparison.

    Args:
        example: any.
        k: which of its completions.
        index: what the micro-batch calls it (`completion_index_C`).
    """
    completion = example.completion_ids[k]
    inputs = [*example.prompt_ids, *completion[:-1]]
    ends, no_pairs = torch.tensor([0, len(inputs)], dtype=torch.int32), torch.tensor([], dtype=torch.int64)
    return MicroBatch(
        input_ids_T=torch.tensor(inputs),
        position_ids_T=torch.arange(len(inputs)),
        layout=AttentionLayout(ends, ends, None, (len(inputs),), (len(inputs),)),
        score_index_M=torch.arange(len(inputs) - len(completion), len(inputs)),
        target_ids_M=torch.tensor(completion),
        completion_of_M=torch.zeros(len(completion), dtype=torch.int64),
        completion_index_C=torch.tensor([index]),
        pair_chosen_B=no_pairs,
        pair_rejected_B=no_pairs,
        pair_weight_B=torch.zeros(0),
        num_tokens=len(inputs),
        num_unshared_tokens=0,
    )


def _two_alone(work: RankWork, batch: MicroBatch, positions: Sequence[int]) -> list[MicroBatch]:
    """A completion from the middle of the micro-batch and its last one, each alone; fillers on an idle rank."""
    completions = [(work.example(p), k) for p in positions for k in range(len(work.example(p).completion_ids))]
    if not completions:
        return [build_micro_batch([], [], share_prompts=False)] * 2
    places = ((len(completions) - 1) // 2, len(completions) - 1)
    return [alone(*completions[place], int(batch.completion_index_C[place])) for place in places]


def _within(work: RankWork, positions: Sequence[int], max_tokens: int) -> tuple[int, ...]:
    """As many of the examples as there is room for when every completion carries its own prompt; none is a filler."""
    room, chosen = max_tokens, []
    for position in positions:
        example = work.example(position)
        room -= len(example.prompt_ids) * len(example.completion_ids) + sum(map(len, example.completion_ids))
        if room < 0:
            break
        chosen.append(position)
    return tuple(chosen)


def _compare(
    other: MicroBatch, other_logps_C: Tensor, batch: MicroBatch, logps_C: Float[Tensor, " C"], scale: float
) -> Comparison:
    """The completions of `other` against the same ones of `batch`."""
    place = {int(index): i for i, index in enumerate(batch.completion_index_C)}
    same = torch.tensor([place[int(index)] for index in other.completion_index_C], dtype=torch.int64)
    expected_C = logps_C.cpu().double()[same]
    lengths_C = torch.bincount(other.completion_of_M.cpu(), minlength=len(same)).double()
    return Comparison(other_logps_C.cpu().double() - expected_C, _honest(lengths_C, expected_C, scale), lengths_C)


def _honest(lengths_C: Tensor, logps_C: Tensor, scale: float) -> Tensor:
    """What rounding explains of a difference between two evaluations (rms), nats: of the tokens, and of their sum."""
    return lengths_C.sqrt() * (scale + _SUM_NOISE * logps_C.abs())


def _honest_margins(work: RankWork, logps_C: Float[Tensor, " C"], scale: float) -> Float[Tensor, " B"]:
    """The same for the margins of all pairs of the rank's share."""
    honest = [torch.zeros(0, dtype=torch.float64)]
    for batch in work.reference_bins():
        lengths_C = torch.bincount(batch.completion_of_M, minlength=len(batch.completion_index_C)).double()
        honest_C = _honest(lengths_C, logps_C.cpu().double()[batch.completion_index_C], scale)
        honest.append(torch.hypot(honest_C[batch.pair_chosen_B], honest_C[batch.pair_rejected_B]))
    return torch.cat(honest)


def _sums(batch: MicroBatch, values_M: Float[Tensor, " M"]) -> Float[Tensor, " C"]:
    return batch.to(values_M.device).completion_sums(values_M)


def _gather(values: Tensor) -> list[float]:
    return [value for share in all_gather_json(values.double().tolist()) for value in share]


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values)) if values else 0.0


def _is_rounding(excess: Sequence[float]) -> bool:
    # `not above`, so that a NaN is no rounding.
    return not excess or (max(map(abs, excess)) <= _LARGEST_LIMIT and _rms(excess) <= _RMS_LIMIT)


def _blame_reference(
    policy: TrainingEngine, reference: LiveReference, logps_M: Tensor, reference_logps_M: Tensor
) -> str:
    if policy.dtype != reference.engine.dtype:
        return f"dtype: the policy computes in {policy.dtype}, the reference in {reference.engine.dtype}"
    worst = float((logps_M - reference_logps_M).abs().max())
    return (
        f"reference: it gives other log-probabilities than the policy for the same micro-batch (by up to {worst:.1e} "
        "nats per token), although both were loaded from the same folder"
    )


def _blame_layout(unshared: Sequence[float], alone: Sequence[float], bins: Sequence[float]) -> list[str]:
    """The fault of the layouts, from differences to the micro-batch in units of honest noise; equal on every rank."""
    if not _is_rounding(alone) and not _is_rounding(unshared):
        return [
            f"attention: with a shared prompt completions score differently than alone ({_size(alone)}): "
            "the kernel is wrong, or the keys or positions given to it. model.prefix_sharing=off or "
            "model.attn_implementation=sdpa avoid it"
        ]
    if not _is_rounding(alone):
        return [
            f"packing: a completion in a micro-batch scores differently than alone ({_size(alone)}): scored "
            "positions, targets, or the border between sequences. model.attn_implementation=sdpa rules out the kernel"
        ]
    if not _is_rounding(unshared):
        return [f"packing: completions score differently with a prompt each than with a shared one ({_size(unshared)})"]
    if not _is_rounding(bins):
        return [
            f"packing: the reference's bins score differently than the policy's micro-batches ({_size(bins)}): values "
            "are assigned to the wrong completions, or depend on what is packed with them"
        ]
    return []


def _size(excess: Sequence[float]) -> str:
    largest = max(map(abs, excess))
    return (
        f"rms {_rms(excess):.2g} times what rounding explains, largest {largest:.2g}; "
        f"allowed {_RMS_LIMIT:g} and {_LARGEST_LIMIT:g}"
    )


def _raise_first(faults: list[str]) -> None:
    for rank, theirs in enumerate(all_gather_json(faults)):
        if theirs:
            raise NumericsError(f"self-check failed on rank {rank}: {theirs[0]}")
