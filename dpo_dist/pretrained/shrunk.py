"""The same architecture with small sizes: what one forward of a few kilobytes can tell of a model of any size."""

from copy import deepcopy
from typing import Any

from transformers import PretrainedConfig

MAX_POSITIONS = 64  # of the small model; positions beyond show whether there is a table of them
WINDOW = 5  # tokens; shorter than what is tried, so that a window which is lost shows
_HEADS, _HEAD_DIM = 4, 16

# Sizes, where the configuration has them and they are larger. Kept: what is a choice and not a size.
_SIZES = {
    "vocab_size": 160,
    "hidden_size": _HEADS * _HEAD_DIM,
    "num_attention_heads": _HEADS,
    "head_dim": _HEAD_DIM,
    "intermediate_size": 96,
    "ffn_hidden_size": 96,
    "ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "qk_head_dim": 16,
    "rotary_dim": 8,
    "d_head": _HEAD_DIM,
    "num_layers_per_stack": 1,
    "sliding_window": WINDOW,
    "attention_window_size": WINDOW,
}
_SPECIAL_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
# Drawn much wider than for training: with the usual 0.02 attention is nearly uniform, and a token seen too much would
# hardly show.
_INITIALIZER_RANGE = 0.25


def shrunk(config: PretrainedConfig) -> PretrainedConfig:
    """A small configuration of the same architecture, with a layer of every kind that it has.

    Args:
        config: of a decoder alone.
    Raises:
        Exception: of any kind: what the architecture's own class says of sizes that do not fit each other.
    """
    values = deepcopy(config.to_dict())
    names = dict(getattr(config, "attribute_map", {}))
    heads, groups = (values.get(names.get(name, name)) for name in ("num_attention_heads", "num_key_value_heads"))
    heads_are_rotary = values.get("head_dim") == values.get("qk_rope_head_dim", 0)
    layers = _shorten_layers(values, names.get("num_hidden_layers", "num_hidden_layers"))
    for name, size in _SIZES.items():
        key = names.get(name, name)
        if type(values.get(key)) is int and values[key] > size:
            values[key] = size
    key = names.get("max_position_embeddings", "max_position_embeddings")
    if type(values.get(key)) is int:
        values[key] = MAX_POSITIONS
    key = names.get("num_key_value_heads", "num_key_value_heads")
    if type(values.get(key)) is int:
        values[key] = _HEADS if groups == heads or "kv_lora_rank" in values else min(groups or 1, _HEADS // 2)
    for name in ("initializer_range", "init_std"):
        if isinstance(values.get(name), float):
            values[name] = _INITIALIZER_RANGE
    if heads_are_rotary:
        values["head_dim"] = values["qk_rope_head_dim"]
    values |= {name: token for token, name in enumerate(_SPECIAL_TOKENS) if name in values}
    values.pop("quantization_config", None)
    small: Any = type(config).from_dict(values)
    small._experts_implementation = "eager"
    assert layers is None or small.num_hidden_layers == layers
    return small


def _shorten_layers(values: dict[str, Any], key: str) -> int | None:
    """Keep the first layers that show every kind; lists with an entry for each layer are cut alike."""
    total = values.get(key)
    if type(total) is not int:
        return None
    per_layer = {name: value for name, value in values.items() if isinstance(value, list) and len(value) == total}
    kinds = list(zip(*(map(str, value) for value in per_layer.values()), strict=True)) or [()] * total
    count = next(n for n in range(1, total + 1) if set(kinds[:n]) == set(kinds))
    count = max(count, min(2, total))
    if values.get("num_kv_shared_layers"):
        # The last layers read keys and values of earlier ones of their kind: every kind once with its own, once so.
        values["num_kv_shared_layers"] = count
        per_layer = {name: [*value[:count], *value[:count]] for name, value in per_layer.items()}
        count *= 2
    values[key] = count
    if isinstance(own := values.get("per_layer_config"), dict):
        values["per_layer_config"] = {index: value for index, value in own.items() if int(index) < count}
    for name, value in per_layer.items():
        values[name] = value[:count]
    return count
