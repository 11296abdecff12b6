"""Which token may see which, and the kernels that compute it.

One function is registered with transformers under our own name, and no mask function: transformers then builds no mask,
and the layout of the micro-batch arrives as a keyword argument, also when a layer is recomputed in backward. Letting
transformers infer packing from position ids would be wrong here: the rejected completion would see the chosen one.

    T packed tokens   U gathered keys   N query heads   K key/value heads   H head dimension   q, k of one segment

Without a layout (generate, somebody else's code) the name behaves like transformers' own sdpa for a single sequence.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dpo_dist.batch import AttentionLayout
from dpo_dist.errors import ConfigError, ModelError

# transformers reads "sdpa" and "flash" inside a name as its own kernels: it would refuse architectures that do not
# support those, or swap in another kernel. So our names say neither.
_NAMES = {"flash_attn": "dpo_dist_fused", "torch": "dpo_dist_varlen", "sdpa": "dpo_dist_segments"}


def choose_backend(requested: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The kernel for `model.attn_implementation`, and why.

    Raises:
        ConfigError: the requested kernel cannot run on this device, with this dtype, or is not installed.
    """
    if requested == "auto" and device.type != "cuda":
        return "sdpa", f"the only one on {device.type}"
    obstacles = {name: _obstacle(name, device, dtype) for name in ("flash_attn", "torch", "sdpa")}
    if requested != "auto":
        if obstacle := obstacles[requested]:
            raise ConfigError(
                f"model.attn_implementation={requested} {obstacle}; use auto, which picks the best kernel that works"
            )
        return requested, "as configured"
    chosen = next(name for name, obstacle in obstacles.items() if obstacle is None)
    rejected = "; ".join(f"{name} {obstacle}" for name, obstacle in obstacles.items() if obstacle)
    return chosen, rejected or "the fastest one"


def _obstacle(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if name == "sdpa":
        return None
    if device.type != "cuda":
        return f"needs a CUDA device, and this run is on {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"computes in bfloat16 or float16 only, and model.dtype is {str(dtype).removeprefix('torch.')}"
    if name == "flash_attn":
        try:
            _flash_attn_function()
        except ImportError as error:
            return f"needs the package flash-attn (pip install dpo-dist[flash]): {error}"
    return None


def register(backend: str) -> str:
    """Make a backend known to transformers; returns the name to load a model with."""
    AttentionInterface.register(_NAMES[backend], _with_layout(_BACKENDS[backend]))
    return _NAMES[backend]


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
            return _sdpa(query_1NTH, key_1KTH, value_1KTH, whole, scale, sliding_window, softcap, s_aux), None
        dpo_layout.reached.add(id(module))
        _require_window(module, sliding_window)
        if dpo_layout.kv_index_U is not None:
            key_1KTH = key_1KTH.index_select(2, dpo_layout.kv_index_U)
            value_1KTH = value_1KTH.index_select(2, dpo_layout.kv_index_U)
        return kernel(query_1NTH, key_1KTH, value_1KTH, dpo_layout, scale, sliding_window, softcap, s_aux), None

    return attention


def _require_window(module: nn.Module, sliding_window: int | None) -> None:
    """Some architectures apply their window in the mask only, and here is no mask."""
    has_window = getattr(module, "sliding_window", None) and getattr(module, "is_sliding", True)
    if has_window and sliding_window is None:
        raise ModelError(
            f"model.model_name_or_path: {type(module).__name__} has a sliding window and does not hand it to its "
            "kernel; only models of this architecture without sliding window can be packed"
        )


def _one_segment(num_queries: int, num_keys: int) -> AttentionLayout:
    cu_q, cu_k = (torch.tensor([0, n], dtype=torch.int32) for n in (num_queries, num_keys))
    return AttentionLayout(cu_q, cu_k, None, (num_queries,), (num_keys,))


# ---- one scaled_dot_product_attention per segment: CPU, and the oracle of the other kernels


def _sdpa(
    query_1NTH: Float[Tensor, "1 N T H"],
    key_1KUH: Float[Tensor, "1 K U H"],
    value_1KUH: Float[Tensor, "1 K U H"],
    layout: AttentionLayout,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    s_aux: Float[Tensor, " N"] | None,
) -> Float[Tensor, "1 T N H"]:
    outputs = []
    # split, not slices: its backward is one concatenation instead of a zero-filled buffer for every segment.
    segments = zip(
        query_1NTH.split(layout.q_lengths, 2),
        key_1KUH.split(layout.k_lengths, 2),
        value_1KUH.split(layout.k_lengths, 2),
        strict=True,
    )
    for q, k, v in segments:
        window = sliding_window if sliding_window is not None and sliding_window < k.shape[2] else None
        if softcap is not None or s_aux is not None:
            mask = _visible(layout, q.shape[2], k.shape[2], window, q.device)
            outputs.append(_explicit_softmax(q, k, v, mask, scale, softcap, s_aux))
        elif window is None and q.shape[2] == k.shape[2]:
            outputs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True))
        else:
            mask = _visible(layout, q.shape[2], k.shape[2], window, q.device)
            outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True))
    return torch.cat(outputs, 2).transpose(1, 2)


def _visible(
    layout: AttentionLayout, num_queries: int, num_keys: int, window: int | None, device: torch.device
) -> Bool[Tensor, "q k"]:
    key = (num_queries, num_keys, window)
    if key not in layout.masks:
        offset = num_keys - num_queries  # bottom right: the last query sees the last key
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(offset)
        layout.masks[key] = mask if window is None else mask.triu(offset - window + 1)
    return layout.masks[key]


def _explicit_softmax(
    q_1NqH: Tensor,
    k_1KkH: Tensor,
    v_1KkH: Tensor,
    mask_qk: Tensor,
    scale: float,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """Attention with what the fused CPU kernel lacks: softcap (Gemma 2) and sinks, a logit more per head (GPT-OSS)."""
    groups = q_1NqH.shape[1] // k_1KkH.shape[1]
    k_1NkH, v_1NkH = k_1KkH.repeat_interleave(groups, 1), v_1KkH.repeat_interleave(groups, 1)
    scores_1Nqk = (q_1NqH @ k_1NkH.mT).to(torch.promote_types(q_1NqH.dtype, torch.float32)) * scale
    if softcap is not None:
        scores_1Nqk = softcap * torch.tanh(scores_1Nqk / softcap)
    scores_1Nqk = scores_1Nqk.masked_fill(~mask_qk, -torch.inf)
    if s_aux is not None:
        sink_1Nq1 = s_aux.to(scores_1Nqk.dtype).view(1, -1, 1, 1).expand(*scores_1Nqk.shape[:3], 1)
        probs_1Nqk = torch.cat([scores_1Nqk, sink_1Nq1], -1).softmax(-1)[..., :-1]
    else:
        probs_1Nqk = scores_1Nqk.softmax(-1)
    return probs_1Nqk.to(q_1NqH.dtype) @ v_1NkH


# ---- one varlen call over all segments. Not yet run on a GPU.


def _flash_attn_function() -> Callable[..., Tensor]:
    from flash_attn import flash_attn_varlen_func  # noqa: PLC0415 - an optional package

    return flash_attn_varlen_func


def _flash_attn(
    query_1NTH: Tensor,
    key_1KUH: Tensor,
    value_1KUH: Tensor,
    layout: AttentionLayout,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    if s_aux is not None:
        raise ConfigError("model.attn_implementation=flash_attn has no attention sinks; use sdpa for this architecture")
    # By keyword only: the packages that install this name disagree on the order of its arguments.
    out_TNH = _flash_attn_function()(
        q=query_1NTH[0].transpose(0, 1),
        k=key_1KUH[0].transpose(0, 1),
        v=value_1KUH[0].transpose(0, 1),
        cu_seqlens_q=layout.cu_q,
        cu_seqlens_k=layout.cu_k,
        max_seqlen_q=layout.max_q,
        max_seqlen_k=layout.max_k,
        softmax_scale=scale,
        causal=True,
        window_size=(-1, -1) if sliding_window is None else (sliding_window - 1, 0),
        softcap=softcap or 0.0,
    )
    return out_TNH[None]


def _torch_varlen(
    query_1NTH: Tensor,
    key_1KUH: Tensor,
    value_1KUH: Tensor,
    layout: AttentionLayout,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    if softcap is not None or s_aux is not None:
        raise ConfigError(
            "model.attn_implementation=torch has neither softcap nor attention sinks; "
            "use flash_attn (softcap) or sdpa for this architecture"
        )
    out_TNH: Any = varlen_attn(
        query=query_1NTH[0].transpose(0, 1),
        key=key_1KUH[0].transpose(0, 1),
        value=value_1KUH[0].transpose(0, 1),
        cu_seq_q=layout.cu_q,
        cu_seq_k=layout.cu_k,
        max_q=layout.max_q,
        max_k=layout.max_k,
        scale=scale,
        window_size=(-1, 0) if sliding_window is None else (sliding_window - 1, 0),
        enable_gqa=True,
    )
    return out_TNH[None]


_BACKENDS: dict[str, Callable[..., Tensor]] = {"flash_attn": _flash_attn, "torch": _torch_varlen, "sdpa": _sdpa}
