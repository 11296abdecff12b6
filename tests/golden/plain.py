"""Log-probabilities by plain transformers: one unpadded sequence at a time, log-softmax in float64. The oracle."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel


@torch.no_grad()
def completion_logp(model: PreTrainedModel, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> float:
    """log pi(completion | prompt), nats, summed over the completion's tokens."""
    ids = torch.tensor([[*prompt_ids, *completion_ids]])
    logits_TV = model(input_ids=ids, use_cache=False).logits[0, len(prompt_ids) - 1 : -1].to(torch.float64)
    targets = ids[0, len(prompt_ids) :]
    return float(torch.log_softmax(logits_TV, dim=-1).gather(-1, targets[:, None]).sum())
