"""What the architecture's own class says of one plain sequence: what every packed forward is held against.

T tokens   M scored tokens   V vocabulary
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dpo_dist.batch import MicroBatch


@torch.no_grad()
def own_logps(model: Any, batch: MicroBatch) -> Float[Tensor, " M"]:
    """log pi(token | prefix) as anybody would compute it with transformers: no layout, no positions, whole logits.

    Args:
        model: transformers' or PEFT's.
        batch: one completion after its prompt. Its logits are T times V numbers, so it is to be short.
    """
    ids_T = batch.input_ids_T
    with own_attention(model):
        # Not `model(...)`: its modules then run in the same order as in a packed forward, which DeepSpeed has recorded
        # to fetch weights ahead.
        logits_TV = type(model).forward(model, input_ids=ids_T[None], use_cache=False).logits[0, -len(ids_T) :]
    logits_MV = logits_TV[batch.score_index_M]
    precision = torch.promote_types(logits_MV.dtype, torch.float32)
    return logits_MV.to(precision).log_softmax(-1).gather(-1, batch.target_ids_M[:, None])[:, 0]


@contextmanager
def own_attention(model: Any) -> Iterator[None]:
    """Inside, every layer computes attention by the function of its own class ("eager"), with the mask it asks for."""
    inner = getattr(model, "get_base_model", lambda: model)()
    before = inner.config._attn_implementation
    inner.set_attn_implementation("eager")
    try:
        yield
    finally:
        inner.set_attn_implementation(before)
