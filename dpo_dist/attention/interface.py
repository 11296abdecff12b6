"""The function that transformers calls for every layer: layout, gathered keys and values, kernel."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dpo_dist.attention.activation import activate
from dpo_dist.attention.choice import Determinism
from dpo_dist.attention.gather import gather_tokens
from dpo_dist.attention.segments import sdpa_segments
from dpo_dist.attention.varlen import flash_attention, torch_attention
from dpo_dist.batch import AttentionLayout
from dpo_dist.errors import ModelError

# transformers reads "sdpa" and "flash" inside a name as its own kernels: it would refuse architectures that do not
# support those, or swap in another kernel. So our names say neither.
_NAMES = {"flash_attn": "dpo_dist_fused", "torch": "dpo_dist_varlen", "sdpa": "dpo_dist_segments"}
_KERNELS: dict[str, Callable[..., Tensor]] = {
    "flash_attn": flash_attention,
    "torch": torch_attention,
    "sdpa": sdpa_segments,
}


def register(backend: str, deterministic: Determinism = "auto", compiled: bool = False) -> str:
    """Make a backend that `choose_backend` gave known to transformers; returns the name to load a model with.

    What an earlier run of this process activated in torch is taken back: a run has what it names and nothing else.

    Args:
        backend: its name.
        deterministic: see `choose_backend`.
        compiled: the layers that call it are (`model/compiled.py`), and it is not.
    """
    kernel, _, implementation = backend.partition("+")
    activate(implementation or None)
    called = _KERNELS[kernel]
    if kernel == "flash_attn":
        called = partial(called, deterministic=deterministic is not False)
    attention = _with_layout(called)
    # Its lengths are numbers, other ones in every micro-batch: inside of what is compiled each would be compiled anew.
    AttentionInterface.register(_NAMES[kernel], torch.compiler.disable(attention) if compiled else attention)
    return _NAMES[kernel]


def _with_layout(kernel: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, None]]:
    def attention(
        module: nn.Module,
        query_1NTH: Tensor,
        key_1KTH: Tensor,
        value_1KTH: Tensor,
        attention_mask: Tensor | None = None,
        *,
        dpo_layout: AttentionLayout | None = None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        scale = query_1NTH.shape[-1] ** -0.5 if scaling is None else scaling
        if dpo_layout is None:
            if attention_mask is not None:
                return ALL_ATTENTION_FUNCTIONS["sdpa"](
                    module, query_1NTH, key_1KTH, value_1KTH, attention_mask, scaling=scale, **kwargs
                )
            whole = _one_segment(query_1NTH.shape[2], key_1KTH.shape[2])
            return sdpa_segments(query_1NTH, key_1KTH, value_1KTH, whole, scale, sliding_window, softcap, s_aux), None
        dpo_layout.reached.add(id(module))
        _require_window(module, sliding_window)
        key_1KUH, value_1KUH = gather_tokens(key_1KTH, dpo_layout), gather_tokens(value_1KTH, dpo_layout)
        return kernel(query_1NTH, key_1KUH, value_1KUH, dpo_layout, scale, sliding_window, softcap, s_aux), None

    return attention


def _require_window(module: nn.Module, sliding_window: int | None) -> None:
    """Some architectures apply their window in the mask only, and here is no mask."""
    has_window = getattr(module, "sliding_window", None) and getattr(module, "is_sliding", True)
    if has_window and sliding_window is None:
        raise ModelError(
            f"model.model_name_or_path: {type(module).__name__} has a sliding window and does not pass it to its "
            "kernel; only models of this architecture without sliding window can be packed"
        )


def _one_segment(num_queries: int, num_keys: int) -> AttentionLayout:
    cu_q, cu_k = (torch.tensor([0, n], dtype=torch.int32) for n in (num_queries, num_keys))
    return AttentionLayout(cu_q, cu_k, None, (num_queries,), (num_keys,))
