"""One call over all segments: flash-attn 2, 3, 4 and torch's variable-length kernel. Not yet run on a GPU.

T packed tokens   U gathered keys   N query heads   K key/value heads   H head dimension   W of values
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from dpo_dist.attention.packages import FlashPackage, find_package
from dpo_dist.batch import AttentionLayout
from dpo_dist.errors import ConfigError


def _of_groups(function: Callable[..., Any]) -> dict[str, Any]:
    # torch 2.11 takes fewer key heads than query heads unasked, and does not know the word; later ones want it.
    return {"enable_gqa": True} if "enable_gqa" in inspect.signature(function).parameters else {}


_GROUPS = _of_groups(varlen_attn)


def flash_attention(
    query_1NTH: Float[Tensor, "1 N T H"],
    key_1KUH: Float[Tensor, "1 K U H"],
    value_1KUW: Float[Tensor, "1 K U W"],
    layout: AttentionLayout,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    s_aux: Float[Tensor, " N"] | None,
    deterministic: bool = True,
) -> Float[Tensor, "1 T N W"]:
    """By whichever flash-attn package is installed.

    Args:
        query_1NTH, key_1KUH, value_1KUW, layout, scale, sliding_window, softcap, s_aux: as of `sdpa_segments`.
        deterministic: the backward. Otherwise the queries' gradient is added up by atomics, in any order.

    Raises:
        ConfigError: there is none, or it lacks what the architecture needs; `choose_backend` finds that earlier.
    """
    package = flash_package(query_1NTH.device)
    limits = package.limits(torch.cuda.get_device_capability(query_1NTH.device))
    if s_aux is not None and not limits.has_sinks:
        raise ConfigError(f"model.attn_implementation=flash_attn: {package.name} has no attention sinks; use sdpa")
    # By keyword only: the packages disagree on the order of their arguments.
    out: Any = package.function()(
        q=query_1NTH[0].transpose(0, 1),
        k=key_1KUH[0].transpose(0, 1),
        v=_filled_up(value_1KUW, limits.value_width(query_1NTH.shape[-1], value_1KUW.shape[-1]))[0].transpose(0, 1),
        cu_seqlens_q=layout.cu_q,
        cu_seqlens_k=layout.cu_k,
        max_seqlen_q=layout.max_q,
        max_seqlen_k=layout.max_k,
        softmax_scale=scale,
        causal=True,  # aligned at the bottom right, in all of them
        window_size=package.no_window if sliding_window is None else (sliding_window - 1, 0),
        softcap=softcap or 0.0,
        deterministic=deterministic,
        **({} if s_aux is None else {"learnable_sink": s_aux}),
    )
    out_TNW = out[0] if isinstance(out, tuple) else out  # flash-attn 4 returns the log-sum-exp as well
    return out_TNW[None, ..., : value_1KUW.shape[-1]]


def flash_package(device: torch.device) -> FlashPackage:
    """The package that is used on a device.

    Raises:
        ConfigError: there is none.
    """
    package, why = find_package(torch.cuda.get_device_capability(device))
    if package is None:
        raise ConfigError(f"model.attn_implementation=flash_attn {why}; use auto")
    return package


def torch_attention(
    query_1NTH: Float[Tensor, "1 N T H"],
    key_1KUH: Float[Tensor, "1 K U H"],
    value_1KUW: Float[Tensor, "1 K U W"],
    layout: AttentionLayout,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    s_aux: Float[Tensor, " N"] | None,
) -> Float[Tensor, "1 T N W"]:
    """By torch.nn.attention.varlen.

    Raises:
        ConfigError: it lacks what the architecture needs; `choose_backend` finds that earlier.
    """
    if softcap is not None or s_aux is not None:
        raise ConfigError(
            "model.attn_implementation=torch has neither softcap nor attention sinks; "
            "use flash_attn (softcap) or sdpa for this architecture"
        )
    out_TNW: Any = varlen_attn(
        query=query_1NTH[0].transpose(0, 1),
        key=key_1KUH[0].transpose(0, 1),
        value=_filled_up(value_1KUW, query_1NTH.shape[-1])[0].transpose(0, 1),
        cu_seq_q=layout.cu_q,
        cu_seq_k=layout.cu_k,
        max_q=layout.max_q,
        max_k=layout.max_k,
        scale=scale,
        window_size=(-1, 0) if sliding_window is None else (sliding_window - 1, 0),
        **_GROUPS,
    )
    return out_TNW[None, ..., : value_1KUW.shape[-1]]


def _filled_up(value_1KUW: Tensor, width: int) -> Tensor:
    """Values filled up with zeros: DeepSeek's are narrower than its keys, and most kernels want one width."""
    missing = width - value_1KUW.shape[-1]
    assert missing >= 0, "padding by less than nothing would cut values off"
    return F.pad(value_1KUW, (0, missing)) if missing else value_1KUW
