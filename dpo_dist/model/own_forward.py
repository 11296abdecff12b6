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
from dpo_dist.model.compiled import compiled_classes
from dpo_dist.model.liger import stock_modules, uses_liger
from dpo_dist.pretrained.architecture import attention_needs


@torch.no_grad()
def own_logps(model: Any, batch: MicroBatch) -> Float[Tensor, " M"]:
    """log pi(token | prefix) as anybody would compute it with transformers: no layout, no positions, whole logits.

    Args:
        model: transformers' or PEFT's.
        batch: one completion after its prompt. Its logits are T times V numbers, so it is to be short.
    """
    ids_T = batch.input_ids_T
    with own_attention(model), stock_modules(model):
        # Not `model(...)`: its modules then run in the same order as in a packed forward, which DeepSpeed has recorded
        # to fetch weights ahead.
        logits_TV = type(model).forward(model, input_ids=ids_T[None], use_cache=False).logits[0, -len(ids_T) :]
    logits_MV = logits_TV[batch.score_index_M]
    precision = torch.promote_types(logits_MV.dtype, torch.float32)
    return logits_MV.to(precision).log_softmax(-1).gather(-1, batch.target_ids_M[:, None])[:, 0]


def own_kernel(model: Any) -> str:
    """Which of transformers' attention functions the class's own forward takes: "sdpa" or "eager".

    In half precision torch's kernel, since "eager" rounds scores before the softmax; but what that kernel would leave
    out, softcap and sinks, needs the class's own function.
    """
    needs = attention_needs(model.config)
    is_plain = getattr(model, "_supports_sdpa", False) and not (needs.has_softcap or needs.has_sinks)
    return "sdpa" if is_plain and next(model.parameters()).dtype in (torch.bfloat16, torch.float16) else "eager"


def rewritten_by(model: Any) -> list[str]:
    """The settings by which layers compute in another way than their classes say."""
    found = ["model.torch_compile"] if compiled_classes(model) else []
    return [*found, *(["model.use_liger_kernel"] if any(map(uses_liger, model.modules())) else [])]


@contextmanager
def own_attention(model: Any) -> Iterator[None]:
    """Inside, every layer computes attention as transformers does, with the mask that its class asks for."""
    inner = getattr(model, "get_base_model", lambda: model)()
    before = inner.config._attn_implementation
    inner.set_attn_implementation(own_kernel(inner))
    try:
        yield
    finally:
        inner.set_attn_implementation(before)
