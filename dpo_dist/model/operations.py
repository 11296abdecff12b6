"""Floating-point operations of a model, in closed form, from its shape."""

from collections import Counter
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from dpo_dist.packing import AttentionCost, CostModel
from dpo_dist.pretrained import attention_needs


def model_cost(
    config: PretrainedConfig, trust_remote_code: bool, is_frozen: bool = False, recomputes: bool = False
) -> CostModel:
    """What a token, a query with a key that it sees, and a scored token cost; operations.

    The model is built without memory, and its matrices are counted: of experts as many as a token is sent to. Of
    attention, the products of queries with keys and of weights with values. Exact to a thousandth for the checked
    architectures (`SHARES_PROMPTS`); of others an estimate, which decides nothing but how even ranks are.

    Args:
        config: what `load_config` gave.
        trust_remote_code: run code that lies in the model's folder.
        is_frozen: an adapter is trained, and nobody computes gradients of the model's own weights.
        recomputes: gradient checkpointing.
    """
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(deepcopy(config), trust_remote_code=trust_remote_code)
    text: Any = config.get_text_config()
    needs = attention_needs(config)
    per_layer = (
        2.0 * getattr(text, "num_attention_heads", 1) * (needs.head_dim + (needs.value_head_dim or needs.head_dim))
    )
    return CostModel(
        per_token=2.0 * _body_weights(model, _routed_share(text)),
        attention=tuple(
            AttentionCost(window, per_layer * layers) for window, layers in sorted(_windows(text).items(), key=str)
        ),
        per_scored_token=2.0 * text.hidden_size * text.vocab_size,
        backward=1.0 if is_frozen else 2.0,
        recomputed=float(recomputes),
    )


def _body_weights(model: nn.Module, routed_share: float) -> float:
    """Weights that a token is multiplied with between embedding and head."""
    head = getattr(model, "get_output_embeddings")()  # noqa: B009  (transformers' method, which nn.Module lacks)
    total = 0.0
    for path, module in model.named_modules():
        if module is head or isinstance(module, nn.Embedding):
            continue
        share = routed_share if "experts" in path.split(".") else 1.0
        total += share * sum(
            weight.numel()
            for name, weight in module.named_parameters(recurse=False)
            if weight.ndim >= 2 and not name.endswith("bias")  # experts' biases lie in one matrix
        )
    return total


def _routed_share(text: Any) -> float:
    """Of the routed experts, the share that computes a token."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((number for name in names if (number := getattr(text, name, None))), None)
    return getattr(text, "num_experts_per_tok", experts) / experts if experts else 1.0


def _windows(text: Any) -> Counter[int | None]:
    """How many layers see how far."""
    window = getattr(text, "sliding_window", None)
    layer_types = getattr(text, "layer_types", None)
    if layer_types is None:
        used = window if getattr(text, "use_sliding_window", True) else None
        return Counter({used: getattr(text, "num_hidden_layers", 1)})
    return Counter(window if kind == "sliding_attention" else None for kind in layer_types)
