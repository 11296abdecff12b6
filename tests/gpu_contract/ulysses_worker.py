"""Sequence parallelism over the heads, as a spike: torchrun --nproc-per-node 2 -m tests.gpu_contract.ulysses_worker OUT

Each rank holds a part of the packed tokens. Before attention the ranks exchange: every rank gets all tokens of its part
of the heads, and calls the package's own attention function with the layout of the whole micro-batch; afterwards they
exchange back (DeepSpeed-Ulysses, arXiv:2309.14509). Nothing of the package is changed for it.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dpo_dist.attention.interface import register
from dpo_dist.distributed import Ranks, process_group
from tests.launching import end_rank
from tests.parity.oracle import gradients, llama_config, objective, packed, random_example, stock_and_ours

# 26 packed tokens: 13 on each of two ranks, with the border in the middle of a prompt.
EXAMPLES = [random_example(1, 7, [5, 4, 2]), random_example(2, 6, [3, 4])]
NAME = "ulysses_spike"


class _Exchange(torch.autograd.Function):
    """Give away parts of one dimension and get parts of another; the backward is the reverse exchange."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, split: int, joined: int) -> Tensor:
        ctx.dimensions = split, joined
        parts = [part.contiguous() for part in tensor.chunk(dist.get_world_size(), split)]
        received = [torch.empty_like(part) for part in parts]
        dist.all_to_all(received, parts)
        return torch.cat(received, joined)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        split, joined = ctx.dimensions
        return _Exchange.apply(grads[0], joined, split), None, None


# Faults by name: what is done to query and value before the exchange.
FAULTS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "none": lambda query, value: (query, value),
    "heads on the wrong rank": lambda query, value: (query.flip(1), value),
    "half a gradient": lambda query, value: (query, (value + value.detach()) / 2),
}


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **settings: Any
) -> tuple[Tensor, None]:
    """The package's function, on all tokens of some heads."""
    query, value = FAULTS[module.planted](query, value)
    whole = (_Exchange.apply(tensor, 1, 2) for tensor in (query, key, value))
    out_1TNH, _ = ALL_ATTENTION_FUNCTIONS[register("sdpa")](module, *whole, mask, **settings)
    return _Exchange.apply(out_1TNH, 1, 2), None


def compare(ranks: Ranks, fault: str) -> dict[str, Any]:
    """Values and gradients beside those of the same model on one rank."""
    batch, rank, size = packed(EXAMPLES, share=True), ranks.rank, ranks.world_size
    _, model = stock_and_ours(llama_config(), torch.float64)
    expected = batch.completion_sums(model(batch))
    expected_gradients = gradients(model, objective(expected))

    part = len(batch.input_ids_T) // size
    mine = slice(rank * part, (rank + 1) * part)
    model.model.set_attn_implementation(NAME)
    for layer in model.model.get_decoder().layers:
        layer.self_attn.planted = fault
    hidden_TD = model.model.get_decoder()(
        input_ids=batch.input_ids_T[None, mine],
        position_ids=batch.position_ids_T[None, mine],
        use_cache=False,
        dpo_layout=batch.layout,
    ).last_hidden_state[0]
    is_mine = (batch.score_index_M >= mine.start) & (batch.score_index_M < mine.stop)
    head: Any = model.model.get_output_embeddings()
    logps = head(hidden_TD[batch.score_index_M[is_mine] - mine.start], batch.target_ids_M[is_mine])
    sums = torch.zeros_like(expected).index_add(0, batch.completion_of_M[is_mine], logps)
    total = sums.detach().clone()
    dist.all_reduce(total)
    # d objective / d (sum over ranks), applied to this rank's part of the sum; gradients then add up over ranks.
    leaf = total.clone().requires_grad_()
    (weights,) = torch.autograd.grad(objective(leaf), leaf)
    actual_gradients = gradients(model, (weights * sums).sum())
    for gradient in actual_gradients.values():
        dist.all_reduce(gradient)
    return {
        "tokens": [len(batch.input_ids_T), part],
        "scored": [int(is_mine.sum()), len(is_mine)],
        "logps": (total - expected).abs().max().item(),
        "gradients": max((actual_gradients[k] - g).abs().max().item() for k, g in expected_gradients.items()),
        "reached": len(batch.layout.reached),
    }


def main() -> None:
    """Without a fault and with each of them."""
    with process_group() as ranks:
        AttentionInterface.register(NAME, attention)
        found = {fault: compare(ranks, fault) for fault in FAULTS}
        Path(f"{sys.argv[1]}.rank{ranks.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
    end_rank()
