"""Pairs of a whole step matched with each other, for losses that compare distributions and not completions (AOT).

Melnyk et al. 2024, arXiv:2406.05882: the k-th smallest value on one side belongs to the k-th smallest on the other. To
know a pair's place, the values of all pairs of all ranks are needed before the first backward: one more forward of the
policy, without gradient. So neither packing nor the number of ranks can change what is matched with what.

    B pairs of a micro-batch   W ranks   N pairs of the step
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from dpo_dist.batch import MicroBatch
from dpo_dist.distributed import sum_over_ranks
from dpo_dist.engine import TrainingEngine
from dpo_dist.losses import Objective
from dpo_dist.packing import StepPlan


@torch.no_grad()
def matched(
    objective: Objective,
    policy: TrainingEngine,
    plan: StepPlan,
    batches: Sequence[MicroBatch],
    reference_logps_C: Float[Tensor, " C"],
) -> list[MicroBatch]:
    """A rank's micro-batches of a step on its device, every pair with what it is matched with. Collective.

    Nothing is computed, and the batches come back as they are, where no loss asks for it.

    Args:
        objective: the losses.
        policy: before the step's update.
        plan: the step.
        batches: this rank's, on any device.
        reference_logps_C: of all the rank's completions, by `MicroBatch.completion_index_C`.
    """
    if not objective.needs_matching:
        return list(batches)
    batches = [batch.to(policy.device) for batch in batches]  # what is matched is made there, and need not travel
    own = [_values(policy, batch, reference_logps_C) for batch in batches]
    sizes = [values.shape[1] for values in own]
    # Rank r's pairs stand at r * N; places that nobody fills sort last.
    ranks, num_pairs = policy.ranks, plan.num_pairs
    table = torch.zeros(5, ranks.world_size, num_pairs, dtype=torch.float64, device=policy.device)
    table[:4, ranks.rank, : sum(sizes)] = torch.cat(own, 1)
    table[4, ranks.rank, : sum(sizes)] = 1.0
    *values, is_there = sum_over_ranks(table).flatten(1)
    margins, reference_margins, chosen, rejected = (value.masked_fill(is_there == 0, torch.inf) for value in values)
    partners = torch.stack(
        [_partner(margins, reference_margins), _partner(chosen, rejected), _partner(rejected, chosen)]
    )
    start = ranks.rank * num_pairs
    parts = partners[:, start : start + sum(sizes)].split(sizes, dim=1)
    return [replace(batch, partners_3B=part.to(policy.device)) for batch, part in zip(batches, parts, strict=True)]


def _values(policy: TrainingEngine, batch: MicroBatch, reference_logps_C: Tensor) -> Float[Tensor, "4 B"]:
    """Of every pair: the policy's and the reference's chosen - rejected, and both log-ratios."""
    logps = policy.completion_logps(batch).double()
    known = reference_logps_C[batch.completion_index_C].double()
    chosen, rejected = batch.pair_chosen_B, batch.pair_rejected_B
    ratios = logps - known
    return torch.stack(
        [logps[chosen] - logps[rejected], known[chosen] - known[rejected], ratios[chosen], ratios[rejected]]
    )


def _partner(values: Tensor, others: Tensor) -> Tensor:
    """For each value the other of the same rank in order."""
    partner = torch.empty_like(values)
    partner[values.argsort(stable=True)] = others.sort().values
    return partner
