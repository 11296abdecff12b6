"""Weights of pairs that the policy itself gives (WPO). They never enter a denominator."""

import torch
from jaxtyping import Float
from torch import Tensor

from dpo_dist.batch import MicroBatch
from dpo_dist.logprobs import TokenScores


@torch.no_grad()
def wpo_weights(batch: MicroBatch, tokens: TokenScores) -> Float[Tensor, " B"]:
    """Zhou et al. 2024, arXiv:2406.11827, eq. 2: how far the pair's completions are what the policy would write.

    exp(mean over tokens of log p(token) - log sum_v p(v)^2) of the chosen, times the same of the rejected completion.
    1 where every token has the probability that a token of the policy's own has in the mean.
    """
    aligned_M = tokens.logps_M - tokens.of("log_sum_sq_probs")
    weights_C = (batch.completion_sums(aligned_M, weighted=False) / batch.completion_length_C).exp()
    return weights_C[batch.pair_chosen_B] * weights_C[batch.pair_rejected_B]
