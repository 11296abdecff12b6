"""Keys and values of a shared prompt, once for each completion that sees it."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dpo_dist.batch import AttentionLayout


class _Gather(torch.autograd.Function):
    """index_select whose backward adds in a fixed order.

    The backward of torch's own adds with atomics on a GPU: the same gradient may differ between two runs in its last
    bit. Here every token's first copy is read, and the further copies are added one after the other, each time to
    tokens that are all different.
    """

    @staticmethod
    def forward(ctx: Any, tokens_1KTH: Tensor, layout: AttentionLayout, kv_index_U: Tensor) -> Tensor:
        ctx.layout = layout
        return tokens_1KTH.index_select(2, kv_index_U)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (grad_1KUH,) = gradients
        layout = ctx.layout
        grad_1KTH = grad_1KUH.index_select(2, layout.first_copy_T)
        copies = (indices.split(layout.further_lengths) for indices in (layout.further_token_F, layout.further_place_F))
        for token, place in zip(*copies, strict=True):
            grad_1KTH.index_add_(2, token, grad_1KUH.index_select(2, place))
        return grad_1KTH, None, None


def gather_tokens(tokens_1KTH: Float[Tensor, "1 K T H"], layout: AttentionLayout) -> Float[Tensor, "1 K U H"]:
    """Keys or values of the packed tokens in the order attention reads them; equals `tokens_1KTH[:, :, kv_index_U]`."""
    kv_index_U = layout.kv_index_U
    return tokens_1KTH if kv_index_U is None else _Gather.apply(tokens_1KTH, layout, kv_index_U)
