"""Exact metrics over a held-out set.

Every row counts exactly once at any world size: the set is planned like training steps, sums are reduced once, and
nothing is padded, repeated or dropped.
"""

from collections.abc import Iterator

import torch

from dpo_dist.baseline import Baseline
from dpo_dist.batch import RankWork
from dpo_dist.distributed import StopRequest, sum_over_ranks
from dpo_dist.matching import matched
from dpo_dist.metrics import LOGGED_STATISTICS, SUMS, RewardMean, Window, step_sums
from dpo_dist.packing import Packer, StepPlan, sizes_of
from dpo_dist.tokenization import TokenizedDataset

CHUNK_EXAMPLES = 1024  # planned at once; only the balance over ranks depends on it
ASK_EVERY = 16  # forwards, of which every rank makes as many; whether to go on


@torch.no_grad()
def evaluate(
    baseline: Baseline,
    dataset: TokenizedDataset,
    rewards: RewardMean,
    beta: float,
    has_reference: bool,
    stop: StopRequest,
) -> dict[str, float]:
    """The metrics of a training step, over a whole data set and without an update. Every rank must call it.

    Args:
        baseline: policy and reference, the loss, and who plans.
        dataset: all of it is evaluated.
        rewards: what was seen in training.
        beta: of the rewards.
        has_reference: whether the policy is compared with one.
        stop: asked now and then.

    Raises:
        Stopped: on every rank, once any rank was asked to stop: a held-out set may take longer than who stops waits.

    Returns:
        `loss`, `rewards/*`, `logps/*` as means over all pairs, `entropy`, `logits/*`, `mean_token_accuracy` as means
        over tokens, `num_pairs` (of demonstrations `num_examples`), and the token counts; equal on every rank.
    """
    loss, policy, reference, packer = baseline.loss, baseline.policy, baseline.reference, baseline.packer
    rank = policy.ranks.rank
    sums = torch.zeros(len(SUMS), dtype=torch.float64, device=policy.ranks.device)
    for plan in _plans(dataset, packer):
        work = RankWork(plan, rank, dataset, packer.share_prompts, loss.config.ld_alpha)
        reference_logps = reference.completion_logps(work)
        # No activations are kept, so the policy takes the large bins too. What is matched over a step is matched here
        # over a chunk.
        batches = matched(loss, policy, plan, work.reference_bins(), reference_logps)
        batches = baseline.given_to(batches, plan, work, reference_logps, rewards, learns=False)
        for index, batch in enumerate(batches):
            if index % ASK_EVERY == 0:
                stop.obey()
            on_device = batch.to(policy.ranks.device)
            tokens = policy.token_scores(on_device, (*loss.statistics, *LOGGED_STATISTICS))
            logps = on_device.completion_sums(tokens.logps_M)
            logratios = logps - reference_logps[on_device.completion_index_C]
            losses = loss(on_device, logps, logratios, tokens)
            sums += step_sums(on_device, logps, logratios, losses, beta, tokens)
    window = Window(dict(zip(SUMS, sum_over_ranks(sums).tolist(), strict=True)))
    num_pairs = int(window.sums["num_pairs"])
    counted = {"num_pairs": num_pairs} if num_pairs else {"num_examples": len(dataset)}
    return {**window.means(has_reference), **counted, **window.counts()}


def _plans(dataset: TokenizedDataset, packer: Packer) -> Iterator[StepPlan]:
    for start in range(0, len(dataset), CHUNK_EXAMPLES):
        rows = range(start, min(start + CHUNK_EXAMPLES, len(dataset)))
        yield packer.plan(start, rows, sizes_of(dataset, rows))
