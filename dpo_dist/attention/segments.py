"""One scaled_dot_product_attention per segment: CPU, and the oracle of the other kernels.

T packed tokens   U gathered keys   N query heads   K key/value heads   H head dimension   W of values
q, k of one segment
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from dpo_dist.batch import AttentionLayout


def sdpa_segments(
    query_1NTH: Float[Tensor, "1 N T H"],
    key_1KUH: Float[Tensor, "1 K U H"],
    value_1KUW: Float[Tensor, "1 K U W"],
    layout: AttentionLayout,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    s_aux: Float[Tensor, " N"] | None,
) -> Float[Tensor, "1 T N W"]:
    """Attention of every segment on its own; runs everywhere, in every dtype."""
    outputs = []
    # split, not slices: its backward is one concatenation instead of a zero-filled buffer for every segment.
    segments = zip(
        query_1NTH.split(layout.q_lengths, 2),
        key_1KUH.split(layout.k_lengths, 2),
        value_1KUW.split(layout.k_lengths, 2),
        strict=True,
    )
    for q, k, v in segments:
        window = sliding_window if sliding_window is not None and sliding_window < k.shape[2] else None
        if softcap is not None or s_aux is not None:
            mask = visible(layout, q.shape[2], k.shape[2], window, q.device)
            outputs.append(_explicit_softmax(q, k, v, mask, scale, softcap, s_aux))
        elif window is None and q.shape[2] == k.shape[2]:
            outputs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True))
        else:
            mask = _added(layout, q, k, window)
            outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True))
    # Contiguous, as from any other kernel: some architectures ask for a view of it.
    return torch.cat([output.transpose(1, 2) for output in outputs], 1)


def _added(layout: AttentionLayout, q_1NqH: Tensor, k_1KkH: Tensor, window: int | None) -> Float[Tensor, "q k"]:
    """What `visible` says as numbers to be added to scores, once for all layers and not once for each."""
    key = (q_1NqH.shape[2], k_1KkH.shape[2], window, q_1NqH.dtype)
    if key not in layout.masks:
        seen = visible(layout, *key[:3], q_1NqH.device)
        layout.masks[key] = torch.zeros_like(seen, dtype=q_1NqH.dtype).masked_fill_(~seen, -torch.inf)
    return layout.masks[key]


def visible(
    layout: AttentionLayout, num_queries: int, num_keys: int, window: int | None, device: torch.device
) -> Bool[Tensor, "q k"]:
    """Which keys of a segment each of its queries sees; kept for the other layers."""
    key = (num_queries, num_keys, window)
    if key not in layout.masks:
        offset = num_keys - num_queries  # bottom right: the last query sees the last key
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(offset)
        layout.masks[key] = mask if window is None else mask.triu(offset - window + 1)
    return layout.masks[key]


def _explicit_softmax(
    q_1NqH: Tensor,
    k_1KkH: Tensor,
    v_1KkW: Tensor,
    mask_qk: Tensor,
    scale: float,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """Attention with what the fused CPU kernel lacks: softcap (Gemma 2) and sinks, a logit more per head (GPT-OSS)."""
    groups = q_1NqH.shape[1] // k_1KkH.shape[1]
    k_1NkH, v_1NkW = k_1KkH.repeat_interleave(groups, 1), v_1KkW.repeat_interleave(groups, 1)
    scores_1Nqk = (q_1NqH @ k_1NkH.mT).to(torch.promote_types(q_1NqH.dtype, torch.float32)) * scale
    if softcap is not None:
        scores_1Nqk = softcap * torch.tanh(scores_1Nqk / softcap)
    scores_1Nqk = scores_1Nqk.masked_fill(~mask_qk, -torch.inf)
    if s_aux is not None:
        sink_1Nq1 = s_aux.to(scores_1Nqk.dtype).view(1, -1, 1, 1).expand(*scores_1Nqk.shape[:3], 1)
        probs_1Nqk = torch.cat([scores_1Nqk, sink_1Nq1], -1).softmax(-1)[..., :-1]
    else:
        probs_1Nqk = scores_1Nqk.softmax(-1)
    return probs_1Nqk.to(q_1NqH.dtype) @ v_1NkW
