"""bfloat16 training in plain torch: what DeepSpeed does at each ZeRO stage, written out for all ranks in one process.

The forward and backward pass of a micro-batch are the package's (held against naive formulas in float64 elsewhere), so
that what is compared is what this file has of its own: which numbers are bfloat16 and which float32 between a
micro-batch's gradient and the next step's weights.

Read in DeepSpeed 0.19.8 (runtime/engine.py, zero/stage_1_and_2.py, zero/stage3.py, bf16_optimizer.py,
fp16/unfused_optimizer.py); A is `data_types.grad_accum_dtype`, R is `communication_data_type`, bfloat16 by default:

| stage | gradients of a step |
|---|---|
| 0 | added up over micro-batches by autograd in bfloat16, summed over ranks in R, rounded to bfloat16 (A is refused) |
| 1 | added up over micro-batches in A, summed over ranks in R, kept in A |
| 2, 3 | summed over ranks in R micro-batch by micro-batch, rounded to A, added up in A |

From there on every stage is alike: float32 norm, clipping and AdamW on float32 masters, weights = masters in bfloat16.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_dist.attention.interface import register
from dpo_dist.batch import RankWork
from dpo_dist.cli.prepare import Prepared
from dpo_dist.model import ScoringModel, load_model
from dpo_dist.packing import StepPlan, sizes_of

Rounding = Callable[[Tensor], Tensor]


def bf16(values: Tensor) -> Tensor:
    """Rounded to bfloat16, held in float32."""
    return values.to(torch.bfloat16).float()


def exact(values: Tensor) -> Tensor:
    """float32 as it is."""
    return values


@dataclass(frozen=True)
class Arithmetic:
    """Where a step rounds."""

    reduce_each: bool  # over ranks after every micro-batch, or once at the step's end
    accumulate: Rounding  # after adding a micro-batch, and of what is kept of a reduction
    reduce: Rounding  # after adding two ranks
    master: Rounding = exact  # after an update; bf16 is the mistake a test must see

    @classmethod
    def of(cls, stage: int, float32_gradients: bool) -> "Arithmetic":
        """What DeepSpeed does at a stage."""
        wide = exact if float32_gradients else bf16
        return cls(reduce_each=stage >= 2, accumulate=bf16 if stage == 0 else wide, reduce=wide)


@dataclass(frozen=True)
class OracleStep:
    """What a step shows."""

    loss: float
    logps_chosen: float
    grad_norm: float


class Oracle:
    """Trains in one process what `world_size` ranks would."""

    def __init__(self, prepared: Prepared, world_size: int, arithmetic: Arithmetic) -> None:
        self.prepared, self.world_size, self.arithmetic = prepared, world_size, arithmetic
        self.policy = _load(prepared.model_folder, prepared)
        self.reference = _load(prepared.reference_folder, prepared).requires_grad_(False)
        self.weights = list(self.policy.parameters())
        self.masters = [weight.detach().float() for weight in self.weights]
        train = prepared.config.train
        groups = [
            {"params": [m for m in self.masters if m.dim() > 1], "weight_decay": train.weight_decay},
            {"params": [m for m in self.masters if m.dim() <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=train.learning_rate, betas=(0.9, 0.999), eps=1e-8)

    def step(self, number: int) -> OracleStep:
        """One update; the numbers are those before it."""
        rows = self.prepared.sampler.examples_of(number)
        plan = self.prepared.packer(self.world_size).plan(number, rows, sizes_of(self.prepared.dataset, rows))
        loss, logps_chosen = 0.0, 0.0
        gradients = []  # [rank][micro-batch][parameter]
        for rank in range(self.world_size):
            ours, rank_loss, rank_logps = self._rank(plan, rank)
            gradients.append(ours)
            loss, logps_chosen = loss + rank_loss, logps_chosen + rank_logps
        total = [self._combine([[g[i] for g in ranks] for ranks in gradients]) for i in range(len(self.weights))]
        norm = torch.stack([g.norm() for g in total]).norm()
        # DeepSpeed's clipping, with its small number
        clip = max(1.0, (float(norm) + 1e-6) / self.prepared.config.train.max_grad_norm)
        for master, gradient in zip(self.masters, total, strict=True):
            master.grad = gradient / clip
        self.optimizer.step()
        with torch.no_grad():
            for weight, master in zip(self.weights, self.masters, strict=True):
                master.copy_(self.arithmetic.master(master))
                weight.copy_(master)
        return OracleStep(loss, logps_chosen / plan.num_pairs, float(norm))

    def _rank(self, plan: StepPlan, rank: int) -> tuple[list[list[Tensor]], float, float]:
        """Gradients of every micro-batch of one rank, and its part of loss and logps."""
        work = RankWork(plan, rank, self.prepared.dataset, self.prepared.sharing[0])
        reference_C = torch.zeros(work.num_completions)
        with torch.no_grad():
            for batch in work.reference_bins():
                reference_C[batch.completion_index_C] = batch.completion_sums(self.reference(batch))
        gradients, loss, logps_chosen = [], 0.0, 0.0
        for batch in work.micro_batches():
            logps_C = batch.completion_sums(self.policy(batch))
            logratios_C = logps_C - reference_C[batch.completion_index_C]
            margins_B = logratios_C[batch.pair_chosen_B] - logratios_C[batch.pair_rejected_B]
            objective = -F.logsigmoid(self.prepared.config.loss.beta * margins_B).sum() / plan.pair_weight
            gradients.append([g.float() for g in torch.autograd.grad(objective, self.weights)])
            loss += float(objective)
            logps_chosen += float(logps_C[batch.pair_chosen_B].sum())
        return gradients, loss, logps_chosen

    def _combine(self, gradients: list[list[Tensor]]) -> Tensor:
        """One parameter's gradients, [rank][micro-batch], added up as the stage does it."""
        arithmetic = self.arithmetic
        by_micro_batch = list(zip(*gradients, strict=True))
        if arithmetic.reduce_each:
            return _sum(
                [arithmetic.accumulate(_sum(list(ranks), arithmetic.reduce)) for ranks in by_micro_batch],
                arithmetic.accumulate,
            )
        per_rank = [_sum(ours, arithmetic.accumulate) for ours in gradients]
        return arithmetic.accumulate(_sum(per_rank, arithmetic.reduce))


def _sum(terms: list[Tensor], rounded: Rounding) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = rounded(total + term)
    return total


def _load(folder: Path, prepared: Prepared) -> ScoringModel:
    return load_model(folder, prepared.model_config, register("sdpa"), prepared.dtype, {}, False, False).train()
