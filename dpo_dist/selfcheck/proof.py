"""What a run proves about itself before the first update.

With equal weights and the same micro-batch, policy and reference agree to the last bit, in any dtype: the same kernels
ran on the same numbers. Where they do not, the weights themselves are compared, and must be equal to the last bit. A
different layout of the same examples sums in another order, so it agrees up to rounding: that noise is measured and
held against what honest arithmetic of the dtype gives. Where something is off, the run stops and says which of dtype,
dropout, reference, attention or packing is at fault.

    M scored tokens   C completions   B preference pairs
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dpo_dist.batch import MicroBatch, RankWork, build_micro_batch
from dpo_dist.distributed import all_gather_json, require_agreement
from dpo_dist.engine import InferenceEngine, TrainingEngine
from dpo_dist.errors import NumericsError
from dpo_dist.losses import Objective, at_equality, near_equality
from dpo_dist.model import rewritten_by
from dpo_dist.noise import NOISE_PER_SQRT_TOKEN, RMS_LIMIT, honest, rms
from dpo_dist.packing import StepPlan
from dpo_dist.reference import ModelReference, Reference
from dpo_dist.selfcheck.blame import (
    blame_cache,
    blame_dropout,
    blame_layout,
    blame_own_forward,
    blame_reference,
    blame_weights,
    raise_first,
)
from dpo_dist.selfcheck.comparison import alone, compare, excess_of, gather
from dpo_dist.selfcheck.own_forward import compare_with_own_forward


@dataclass(frozen=True)
class Proof:
    """What was measured; equal on every rank."""

    same_weights: bool  # policy and reference are the same function at the start
    bitwise: bool  # and gave the same log-probabilities to the last bit, not only up to a kernel's order of sums
    skipped: str  # why policy and reference could not be compared; "" where they were
    layout_noise: float  # rms over completions, nats per sqrt(token): unshared, and alone, against the micro-batch
    own_noise: float  # the same, nats per sqrt(token): the architecture's own forward against a packed one
    margin_noise: float  # rms over pairs of chosen - rejected difference, nats: the reference against micro-batches
    margin_bound: float  # the same for honest arithmetic of this dtype and these lengths, an upper bound

    def lines(self) -> list[str]:
        """What to tell the user."""
        agreement = "agree bitwise" if self.bitwise else "equal weights, agree up to rounding"
        if self.skipped:
            agreement = f"skipped: {self.skipped}"
        return [
            f"self-check: policy and reference on the same micro-batch: {agreement}",
            f"self-check: other layouts of the same examples differ by {self.layout_noise:.1e} nats per sqrt(token)",
            f"self-check: the architecture's own forward differs by {self.own_noise:.1e} nats per sqrt(token)",
            f"self-check passed: margin noise {self.margin_noise:.1e} nats (bound {self.margin_bound:.1e})",
        ]


@torch.no_grad()
def prove(
    policy: TrainingEngine,
    reference: Reference,
    work: RankWork,
    plan: StepPlan,
    same_weights: bool,
    max_tokens: int,
    skipped: str = "reference differs",
) -> Proof:
    """Compare engines and layouts on the first micro-batch of every rank. Collective: every rank must call it.

    Args:
        policy: before its first update.
        reference: any; where it is no model in memory, what it has stored is compared with the policy.
        work: this rank's share of the first step.
        plan: the first step.
        same_weights: whether policy and reference are the same function in the same dtype.
        max_tokens: budget of a forward without gradient.
        skipped: why they are not, for people.
    Raises:
        NumericsError: on every rank, naming the part at fault.
    """
    scale = NOISE_PER_SQRT_TOKEN[policy.dtype]
    positions = plan.micro_batches[policy.ranks.rank][0]
    batch = work.build(positions, work.share_prompts)
    logps_M, again_M = policy.token_logps(batch), policy.token_logps(batch)
    logps_C = _sums(batch, logps_M)
    again = compare(batch, _sums(batch, again_M), batch, logps_C, scale)
    faults = blame_weights({"policy": logps_C}) + blame_dropout(again.excess())
    bitwise, answered_C = _hear(policy, reference, batch, logps_M, same_weights, faults)

    # Other layouts of the same examples: equally many forwards on every rank, some of them fillers.
    own_prompts = work.build(_within(work, positions, max_tokens), share_prompts=False)
    unshared_C = _sums(own_prompts, policy.token_logps(own_prompts))
    unshared = compare(own_prompts, unshared_C, batch, logps_C, scale)
    alone = [(one, _sums(one, policy.token_logps(one))) for one in _two_alone(work, batch, positions)]
    lonely = [compare(one, logps, batch, logps_C, scale) for one, logps in alone]
    packed = [compare(one, logps, own_prompts, unshared_C, scale) for one, logps in alone]

    # What the steps will be given, against its answer for this micro-batch; a cache's against the policy's.
    given_C = reference.completion_logps(work)
    mine_C = given_C[batch.completion_index_C.to(given_C.device)]
    stored = answered_C is None and same_weights
    its_scale = NOISE_PER_SQRT_TOKEN[getattr(reference, "dtype", policy.dtype)]
    expected_C = logps_C if stored else mine_C if answered_C is None else answered_C
    bins = compare(batch, mine_C, batch, expected_C, its_scale)
    of_bins, of_cache = ([], bins.excess()) if stored else (bins.excess(), [])
    faults += blame_layout(unshared.excess(), excess_of(lonely), excess_of(packed), of_bins) + blame_cache(of_cache)
    own_noise, of_own = _against_own_forward(policy, None if same_weights else reference, work, positions)
    raise_first(faults + of_own)
    margins_B = bins.difference_C[batch.pair_chosen_B] - bins.difference_C[batch.pair_rejected_B]
    return Proof(
        same_weights,
        bitwise,
        "" if same_weights else skipped,
        layout_noise=rms([x for one in (unshared, *lonely) for x in one.per_root_token()]),
        own_noise=own_noise,
        margin_noise=rms(gather(margins_B)),
        margin_bound=RMS_LIMIT * rms(gather(_honest_margins(work, given_C, max(scale, its_scale)))),
    )


def _against_own_forward(
    policy: TrainingEngine, reference: Reference | None, work: RankWork, positions: Sequence[int]
) -> tuple[float, list[str]]:
    """How far the policy is from its architecture's own forward, nats per sqrt(token); and the faults. Collective.

    Args:
        policy: see `prove`.
        reference: with weights of its own, or not a model.
        work: see `prove`.
        positions: the first micro-batch's.
    """
    found = {"policy": compare_with_own_forward(policy, work, positions)}
    if isinstance(engine := getattr(reference, "engine", None), InferenceEngine):
        found["reference"] = compare_with_own_forward(engine, work, positions)
    noise = rms([value for one in found["policy"] for value in one.per_root_token()])
    excess = {name: excess_of(comparisons) for name, comparisons in found.items()}
    return noise, blame_own_forward(excess, rewritten_by(policy.model.model))


def _hear(
    policy: TrainingEngine,
    reference: Reference,
    batch: MicroBatch,
    logps_M: Float[Tensor, " M"],
    same_weights: bool,
    faults: list[str],
) -> tuple[bool, Float[Tensor, " C"] | None]:
    """The reference's own answer for a micro-batch: whether equal to the last bit, and its sums. Adds to the faults.

    Collective.
    """
    if not isinstance(reference, ModelReference):
        return False, None
    answer_M = reference.token_logps(batch)
    answer_C = _sums(batch, answer_M)
    faults += blame_weights({"reference": answer_C})
    bitwise = all(all_gather_json(torch.equal(logps_M, answer_M)))
    if same_weights and not bitwise:
        scale = NOISE_PER_SQRT_TOKEN[policy.dtype]
        faults += blame_reference(
            policy, reference, compare(batch, answer_C, batch, _sums(batch, logps_M), scale).excess()
        )
    return bitwise, answer_C


def check_first_loss(measured: float, loss: Objective, proof: Proof) -> str:
    """Hold the first step's mean loss against its closed form; returns what to tell the user.

    Raises:
        NumericsError: the loss is off by more than the noise of the margins explains.
    """
    expected = at_equality(loss)
    if not proof.same_weights:
        return f"self-check: first loss: skipped: {proof.skipped}"
    if math.isnan(expected):
        return "self-check: first loss: skipped: it depends on more than policy and reference being equal"
    tolerance = near_equality(loss, proof.margin_bound) + 1e-6
    if abs(measured - expected) > tolerance:
        raise NumericsError(
            f"self-check: first loss is {measured:.6f}; policy and reference are the same weights, so it must be "
            f"{expected:.6f} within {tolerance:.1e}: reference log-probabilities do not belong to these completions"
        )
    return f"self-check: first loss {measured:.6f} equals its closed form {expected:.6f} within {tolerance:.1e}"


def check_agreement(facts: Mapping[str, str]) -> None:
    """Every rank must be about to compute the same step of the same run. Collective.

    Args:
        facts: what must be equal on all ranks: its name for people, and its value or a fingerprint of it.

    Raises:
        RankMismatchError: on every rank, naming what differs.
    """
    require_agreement(facts)


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


def _honest_margins(work: RankWork, logps_C: Float[Tensor, " C"], scale: float) -> Float[Tensor, " B"]:
    """The same for the margins of all pairs of the rank's share."""
    margins = [torch.zeros(0, dtype=torch.float64)]
    for batch in work.reference_bins():
        lengths_C = torch.bincount(batch.completion_of_M, minlength=len(batch.completion_index_C)).double()
        honest_C = honest(lengths_C, logps_C.cpu().double()[batch.completion_index_C], scale)
        margins.append(torch.hypot(honest_C[batch.pair_chosen_B], honest_C[batch.pair_rejected_B]))
    return torch.cat(margins)


def _sums(batch: MicroBatch, values_M: Float[Tensor, " M"]) -> Float[Tensor, " C"]:
    return batch.to(values_M.device).completion_sums(values_M)
