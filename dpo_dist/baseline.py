"""What the reward of a rated completion is held against, where nothing is paired: KTO's and BCO's baselines.

`kto`: how far the policy has moved from the reference on completions that do not belong to their prompts, an estimate
of their KL divergence (Ethayarajh et al. 2024, arXiv:2402.01306). Each prompt of the step takes a completion of
the rated example before it, as in TRL, whose batch is the whole step here; TRL takes one after the same prompt too.
`bco`: the mean reward of all rated completions so far, this step's among them (Jung et al. 2024, arXiv:2404.04656; a
running mean as in TRL).

Both are of the whole step and without gradient: known before the first backward by one more forward of the policy, and
for `kto` one of the reference. So neither packing nor the number of ranks changes them.

    C completions
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dpo_dist.batch import Examples, MicroBatch, RankWork
from dpo_dist.distributed import sum_over_ranks
from dpo_dist.engine import TrainingEngine
from dpo_dist.losses import Objective
from dpo_dist.metrics import RewardMean
from dpo_dist.packing import ExampleSize, Packer, StepPlan, sizes_of
from dpo_dist.reference import Reference
from dpo_dist.tokenization import TokenizedDataset, TokenizedExample


@dataclass(frozen=True)
class Baseline:
    """Finds the baselines of a step.

    Args:
        loss: asks for them, or not.
        policy, reference: who is asked.
        packer: plans the forwards.
        max_length: tokens of a prompt with a completion of another one, beyond which the completion is cut.
    """

    loss: Objective
    policy: TrainingEngine
    reference: Reference
    packer: Packer
    max_length: int | None

    @torch.no_grad()
    def given_to(
        self,
        batches: Sequence[MicroBatch],
        plan: StepPlan,
        work: RankWork,
        reference_logps_C: Float[Tensor, " C"],
        rewards: RewardMean,
        learns: bool,
    ) -> list[MicroBatch]:
        """A rank's micro-batches of a step, with what the losses hold rewards against. Collective.

        Nothing is computed, and the batches come back as they are, where no loss asks for it.

        Args:
            batches: this rank's.
            plan: the step.
            work: this rank's part of it.
            reference_logps_C: of all the rank's completions, by `MicroBatch.completion_index_C`.
            rewards: of the steps before.
            learns: whether this step is trained on, and `rewards` gains its own.
        """
        found: dict[str, Any] = {}
        if self.loss.needs("kl_baseline"):
            found["kl_baseline"] = self._constant(self._divergence(plan, work))
        if self.loss.needs("reward_baseline"):
            if learns:
                self._learn(batches, reference_logps_C, rewards)
            found["reward_baseline"] = self._constant(rewards.value)
        if not found:
            return list(batches)
        return [replace(batch.to(self.policy.device), **found) for batch in batches]

    def _constant(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float64, device=self.policy.device)

    def _divergence(self, plan: StepPlan, work: RankWork) -> float:
        dataset: Any = work.dataset
        # As long as what stands in the data: that fits, and no setting for memory decides what is compared.
        longest = dataset.most_tokens if self.max_length is None else min(self.max_length, dataset.most_tokens)
        strangers = Strangers(dataset, plan.examples, longest)
        if not strangers.rows:
            return 0.0
        share = RankWork(
            self.packer.plan(plan.step, strangers.rows, strangers.sizes),
            self.policy.ranks.rank,
            strangers,
            self.packer.share_prompts,
        )
        reference_logps_C = self.reference.completion_logps(share)
        total, count = self._log_ratios(share.reference_bins(), reference_logps_C, rated_only=False)
        return max(total / count, 0.0)

    def _learn(self, batches: Sequence[MicroBatch], reference_logps_C: Tensor, rewards: RewardMean) -> None:
        total, count = self._log_ratios(batches, reference_logps_C, rated_only=True)
        if math.isfinite(total):  # else the step is left out, or ends the run
            rewards.total += total
            rewards.count += count

    def _log_ratios(
        self, batches: Sequence[MicroBatch], reference_logps_C: Tensor, rated_only: bool
    ) -> tuple[float, float]:
        """Their sum and number over all ranks."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.policy.device)
        for batch in batches:
            on_device = batch.to(self.policy.device)
            logratios = (
                self.policy.completion_logps(on_device).double()
                - reference_logps_C[on_device.completion_index_C].double()
            )
            counted = on_device.rating_C.double().abs() if rated_only else torch.ones_like(logratios)
            sums += torch.stack([(counted * logratios).sum(), counted.sum()])
        total, count = sum_over_ranks(sums).tolist()
        return total, count


class Strangers(Examples):
    """Each prompt of a step's rated examples, with a completion of the one before it; the first takes the last's.

    One with the same prompt is passed over, for its completions belong to this prompt; where no other prompt is left,
    there is nothing to compare. Where an example has several completions, they take turns. A data set that is indexed
    by the same rows, `rows`.

    Args:
        dataset: the run's.
        examples: rows of the step, in its order.
        max_tokens: of a prompt and its completion, which is cut.
    """

    def __init__(self, dataset: TokenizedDataset, examples: Sequence[int], max_tokens: int) -> None:
        self._dataset = dataset
        rated = [(row, size) for row, size in zip(examples, sizes_of(dataset, examples), strict=True) if size.ratings]
        before = _with_another_prompt([dataset.prompt_of(row) for row, _ in rated])
        self.rows = [row for (row, _), other in zip(rated, before, strict=True) if other is not None]
        self.sizes: list[ExampleSize] = []
        """Of each of them its prompt and the other's completion."""
        self._taken: dict[int, tuple[int, int, int]] = {}  # of each row the other one, which completion, its tokens
        for place, (row, size) in enumerate(rated):
            if (taken := before[place]) is None:
                continue
            other, lengths = rated[taken][0], rated[taken][1].completions
            number = place % len(lengths)
            length = min(lengths[number], max_tokens - size.prompt)
            self._taken[row] = (other, number, length)
            self.sizes.append(ExampleSize(size.prompt, (length,), ()))

    def __len__(self) -> int:
        """Rows of the whole data set."""
        return len(self._dataset)

    def __getitem__(self, row: int, /) -> TokenizedExample:
        """A prompt, and a completion that was written for another one."""
        other, number, length = self._taken[row]
        own, foreign = self._dataset[row], self._dataset[other].completion_ids[number]
        return TokenizedExample(own.prompt_ids, (foreign[:length],), (), own.source)


def _with_another_prompt(prompts: Sequence[tuple[int, ...]]) -> list[int | None]:
    """Of each place the nearest one before it, in a circle, that has another prompt; None where all are the same."""
    found: list[int | None] = [None] * len(prompts)
    for place in (*range(len(prompts)), *range(len(prompts))):  # the second time round the last ones are known
        found[place] = place - 1 if prompts[place - 1] != prompts[place] else found[place - 1]
    return [None if place is None else place % len(prompts) for place in found]
