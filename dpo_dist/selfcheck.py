"""What a run proves about itself before the first update.

With equal weights and the same micro-batch, policy and reference must agree to the last bit, in any dtype: the same
kernels ran on the same numbers. A different layout of the same examples sums in another order, so it agrees up to
rounding: that noise is measured and held against what honest arithmetic of the dtype gives. Where something is off, the
run stops and says which of dtype, dropout, reference, attention or packing is at fault.
"""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from dpo_dist.batch import MicroBatch, RankWork, build_micro_batch
from dpo_dist.distributed import all_gather_json, require_agreement
from dpo_dist.engine import TrainingEngine
from dpo_dist.errors import NumericsError
from dpo_dist.losses import PairLoss, at_equality
from dpo_dist.packing import StepPlan
from dpo_dist.reference import LiveReference

# Standard deviation of the difference of two honest evaluations of one completion's log-probability, in nats per
# sqrt(token). bfloat16: measured on a 135M model with two summation orders; the others follow its unit roundoff, with
# room for float32, where rounding of the sum itself (about 1e-7 of it) dominates.
NOISE_PER_SQRT_TOKEN = {torch.bfloat16: 0.03, torch.float16: 0.004, torch.float32: 1e-5, torch.float64: 1e-12}
_MAX_OVER_RMS = 8.0  # a completion this many standard deviations off is not rounding
_RMS_LIMIT = 3.0  # nor is a whole micro-batch this many off


@dataclass(frozen=True)
class Proof:
    """What was measured; equal on every rank."""

    same_weights: bool  # policy and reference started from the same folder
    layout_noise: float  # rms over completions, nats per sqrt(token): shared against unshared, packed against alone
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
    rank, faults = policy.ranks.rank, []
    positions = plan.micro_batches[rank][0]
    batch = work.build(positions, work.share_prompts)
    logps_M = policy.token_logps(batch)
    if not torch.equal(logps_M, policy.token_logps(batch)):
        faults.append("dropout: the policy gives two answers for one micro-batch; dropout or a random layer is active")
    reference_logps_M = reference.engine.token_logps(batch)
    if same_weights and not torch.equal(logps_M, reference_logps_M):
        faults.append(_blame_reference(policy, reference, logps_M, reference_logps_M))
    logps_C = _sums(batch, logps_M)

    # Other layouts of the same examples. Every rank runs equally many forwards, with fillers where it has nothing.
    few = _within(work, positions, max_tokens)
    noise = [_layout_noise(policy, work.build(few, share_prompts=False), batch, logps_C)]
    for alone in _first_completions_alone(work, positions):
        noise.append(_layout_noise(policy, alone, batch, logps_C))
    bins_C = reference.completion_logps(work.reference_bins(), work.num_completions)
    bin_difference_C = (bins_C[batch.completion_index_C.to(bins_C.device)] - _sums(batch, reference_logps_M)).cpu()
    noise.append(bin_difference_C.double() / _sqrt_lengths(batch))

    scale = NOISE_PER_SQRT_TOKEN[policy.dtype]
    layout = _gather(torch.cat(noise[:-1]))
    bins = _gather(noise[-1])
    faults += _too_large(layout, scale, "attention or packing: another layout of the same examples")
    faults += _too_large(bins, scale, "packing: the reference's bins against the policy's micro-batches")
    _raise_first(faults)
    margins = _gather(bin_difference_C[batch.pair_chosen_B] - bin_difference_C[batch.pair_rejected_B])
    return Proof(same_weights, _rms(layout), _rms(margins), _margin_bound(batch, scale))


def check_first_loss(measured: float, loss: PairLoss, proof: Proof) -> str:
    """Hold the first step's mean loss against its closed form; returns what to tell the user.

    Raises:
        NumericsError: the loss is off by more than the noise of the margins explains.
    """
    expected = at_equality(loss)
    if not proof.same_weights:
        return "self-check: first loss: skipped: reference differs"
    margin = max(proof.margin_bound, 4 * proof.margin_noise)
    shifted = (float(loss(torch.tensor([shift]), torch.zeros(1))) for shift in (margin, -margin))
    tolerance = max(abs(value - expected) for value in shifted) + 1e-6
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


def _sums(batch: MicroBatch, values_M: Float[Tensor, " M"]) -> Float[Tensor, " C"]:
    return batch.to(values_M.device).completion_sums(values_M)


def _sqrt_lengths(batch: MicroBatch) -> Float[Tensor, " C"]:
    lengths_C = torch.bincount(batch.completion_of_M, minlength=len(batch.completion_index_C))
    return lengths_C.double().sqrt()


def _layout_noise(
    policy: TrainingEngine, other: MicroBatch, batch: MicroBatch, logps_C: Float[Tensor, " C"]
) -> Float[Tensor, " c"]:
    """Differences, in nats per sqrt(token), of the completions that `other` has in common with `batch`."""
    other_logps = _sums(other, policy.token_logps(other)).cpu().double()
    place = {int(index): i for i, index in enumerate(batch.completion_index_C)}
    common = torch.tensor([place[int(index)] for index in other.completion_index_C], dtype=torch.int64)
    return (other_logps - logps_C.cpu().double()[common]) / _sqrt_lengths(other)


def _within(work: RankWork, positions: tuple[int, ...], max_tokens: int) -> tuple[int, ...]:
    """As many of the examples as an unshared layout has room for, at least one."""
    room, chosen = max_tokens, []
    for position in positions:
        example = work.example(position)
        room -= len(example.prompt_ids) * len(example.completion_ids) + sum(map(len, example.completion_ids))
        if room < 0 and chosen:
            break
        chosen.append(position)
    return tuple(chosen)


def _first_completions_alone(work: RankWork, positions: tuple[int, ...]) -> list[MicroBatch]:
    """The first two completions of the first example, each in a forward of its own; fillers on an idle rank."""
    if not positions:
        return [build_micro_batch([], [], share_prompts=False)] * 2
    example, offset = work.example(positions[0]), int(work.build(positions[:1], True).completion_index_C[0])
    indices = [0, min(1, len(example.completion_ids) - 1)]
    return [
        build_micro_batch(
            [replace(example, completion_ids=(example.completion_ids[k],), pairs=())], [offset + k], share_prompts=False
        )
        for k in indices
    ]


def _gather(values: Tensor) -> list[float]:
    """Every rank's values, in rank order."""
    return [value for share in all_gather_json(values.double().tolist()) for value in share]


def _rms(values: list[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values)) if values else 0.0


def _too_large(noise: list[float], scale: float, what: str) -> list[str]:
    worst, rms = max(map(abs, noise), default=0.0), _rms(noise)
    if worst <= _MAX_OVER_RMS * scale and rms <= _RMS_LIMIT * scale:
        return []
    return [
        f"{what} changes log-probabilities by {rms:.1e} nats per sqrt(token) (largest {worst:.1e}); rounding explains "
        f"{_RMS_LIMIT * scale:.1e} (largest {_MAX_OVER_RMS * scale:.1e}). Set model.prefix_sharing=off or "
        "model.attn_implementation=sdpa to find out which"
    ]


def _margin_bound(batch: MicroBatch, scale: float) -> float:
    """What margins of this dtype and these lengths may be off by: rms limit times sqrt(chosen + rejected tokens)."""
    lengths_C = _sqrt_lengths(batch) ** 2
    pair_tokens_B = lengths_C[batch.pair_chosen_B] + lengths_C[batch.pair_rejected_B]
    return max(all_gather_json(float(_RMS_LIMIT * scale * pair_tokens_B.sqrt().mean()) if len(pair_tokens_B) else 0.0))


def _raise_first(faults: list[str]) -> None:
    for rank, theirs in enumerate(all_gather_json(faults)):
        if theirs:
            raise NumericsError(f"self-check failed on rank {rank}: {theirs[0]}")
