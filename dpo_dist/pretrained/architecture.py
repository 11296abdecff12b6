"""What an architecture supports, and what it does between the last matrix product and the softmax."""

from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, PretrainedConfig

from dpo_dist.attention import AttentionNeeds
from dpo_dist.errors import ConfigError, ModelError
from dpo_dist.logprobs import LogitTransform
from dpo_dist.pretrained.folder import first_line, raise_if_own_code

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Softmax attention over all keys, positions only through position_ids: checked one by one against their own stock
# forward in tests/parity/test_architectures.py.
SHARES_PROMPTS = frozenset(
    "apertus arcee cohere cohere2 deepseek_v2 deepseek_v3 ernie4_5 exaone4 gemma gemma2 gemma3_text glm glm4 glm4_moe "
    "gpt2 gpt_neox gpt_oss granite granitemoe helium llama ministral mistral mixtral nanochat olmo olmo2 olmo3 olmoe "
    "phi phi3 qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 starcoder2".split()
)
# State that flows along the sequence would carry one packed completion into the next.
STATEFUL_LAYERS = frozenset({"linear_attention", "mamba", "conv", "chunked_attention", "recurrent"})
STATEFUL_MODELS = frozenset(
    "bamba falcon_h1 falcon_mamba granitemoehybrid jamba lfm2 lfm2_moe llama4 llama4_text mamba mamba2 nemotron_h "
    "recurrent_gemma rwkv xlstm zamba zamba2".split()
)
INDEXED_LAYERS = frozenset({"indexed_attention"})
# Their window is in the mask alone, and a packed forward has no mask: it would be lost. The first forward asks every
# attention layer as well (attention/interface.py), which finds those that are not transformers' own.
WINDOW_IN_MASK = frozenset({"blt", "doge", "phimoe", "qwen2_moe"})
_INNER_CONFIGS = frozenset({"attn_config", "ffn_config"})  # of a decoder's layers, not of another model
# Frequencies of any other rope type depend on the longest position of the batch, hence on the packing.
PACKABLE_ROPE = frozenset({"default", "linear", "llama3", "yarn"})


def load_config(
    folder: Path,
    trust_remote_code: bool,
    key: str = "model.model_name_or_path",
    option: str = "model.trust_remote_code=true",
) -> PretrainedConfig:
    """The architecture's configuration, with every dropout and noise at 0 (`disabled_dropout` keeps what it was).

    Args:
        folder: what `resolve_folder` gave.
        trust_remote_code: run code that lies in the folder.
        key: the dotted path that the folder was written under, for messages.
        option: what would set `trust_remote_code`, for messages.
    Raises:
        ModelError: the folder holds no usable configuration.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    # Configuration classes check their values, each in its own way.
    except Exception as error:
        raise_if_own_code(error, f"{key}={folder}", option)
        reason = first_line(error)
        raise ModelError(f"{key}={folder}: its config.json cannot be used: {reason}") from None
    if (quantised := getattr(config, "quantization_config", None)) is not None:
        kind = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
        raise ModelError(
            f"{key}={folder}: its weights are quantised ({getattr(kind, 'value', kind)}), and only "
            "float32, bfloat16 and float16 can be trained; give a folder with such weights (adapter.load_in_4bit "
            "quantises them here)"
        )
    config.disabled_dropout = {
        name: value
        for name, value in vars(config).items()
        if ("drop" in name or "jitter" in name) and isinstance(value, float) and value > 0
    }
    for name in config.disabled_dropout:
        setattr(config, name, 0.0)
    return config


def decide_sharing(config: PretrainedConfig, requested: Literal["auto", "on", "off"]) -> tuple[bool, str]:
    """Whether every prompt is computed once, and why.

    Raises:
        ModelError: the architecture cannot be packed at all.
        ConfigError: sharing was asked for and the architecture is not on the list.
    """
    if obstacle := _cannot_be_packed(config):
        raise ModelError(f"model.model_name_or_path: architecture {config.model_type} cannot be packed: {obstacle}")
    if config.model_type in SHARES_PROMPTS:
        if requested == "off":
            return False, "as configured"
        return True, f"architecture {config.model_type} is on the list of checked ones"
    if requested == "on":
        raise ConfigError(
            f"model.prefix_sharing=on: architecture {config.model_type} is not on the list of checked ones "
            f"({', '.join(sorted(SHARES_PROMPTS))}); use auto or off, which pack without sharing"
        )
    return False, f"architecture {config.model_type} is not on the list of checked ones"


def _cannot_be_packed(config: PretrainedConfig) -> str | None:
    parts = [name for name in config.sub_configs if getattr(config, name, None) is not None]
    if parts := [name for name in parts if name not in _INNER_CONFIGS]:
        listed = ", ".join(parts)
        return f"it has parts beside a decoder ({listed}); save its language model alone (docs/models.md shows how)"
    if config.is_encoder_decoder:
        return "it is an encoder with a decoder, and only decoders can be"
    stateful = STATEFUL_LAYERS.intersection(getattr(config, "layer_types", None) or ())
    if stateful or config.model_type in STATEFUL_MODELS:
        layers = ", ".join(sorted(stateful)) or "its layers"
        return f"{layers} carry state along the sequence, so packed completions would leak into each other"
    if indexed := INDEXED_LAYERS.intersection(getattr(config, "layer_types", None) or ()):
        return f"{', '.join(sorted(indexed))} chooses its keys by a mask, and a packed forward has none"
    if config.model_type in WINDOW_IN_MASK and _has_window(config) and not _window_is_wide(config):
        return (
            f"its sliding window of {config.sliding_window} tokens is not passed to the kernel; "
            "only models of this architecture without a sliding window can be"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    for parameters in nested:
        rope_type = parameters.get("rope_type", "default")
        if rope_type not in PACKABLE_ROPE:
            return (
                f"rope type {rope_type} depends on the longest position in the batch; supported: {_list(PACKABLE_ROPE)}"
            )
    return None


# Architectures whose layers give their kernel a logit per head that no key stands for.
_HAS_SINKS = frozenset("gpt_oss granite_swa granitemoe_swa mimo_v2_flash".split())


def attention_needs(config: PretrainedConfig) -> AttentionNeeds:
    """What an architecture asks of its attention kernel."""
    text: Any = config.get_text_config()
    latent = getattr(text, "qk_head_dim", None)
    head_dim = latent or getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    value_head_dim = getattr(text, "v_head_dim", None) or head_dim
    return AttentionNeeds(
        head_dim=head_dim,
        value_head_dim=None if value_head_dim == head_dim else value_head_dim,
        has_window=_has_window(text),
        has_softcap=getattr(text, "attn_logit_softcapping", None) is not None,
        has_sinks=text.model_type in _HAS_SINKS,
    )


def _has_window(text: Any) -> bool:
    """Whether a layer may have a sliding window; rather yes than no, where a configuration is not clear."""
    layer_types = getattr(text, "layer_types", None)
    if layer_types is not None:
        return "sliding_attention" in layer_types
    return bool(getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True))


def _window_is_wide(config: Any) -> bool:
    """Whether no sequence that the model can read is longer than its window."""
    return config.sliding_window >= (getattr(config, "max_position_embeddings", None) or float("inf"))


def _list(names: frozenset[str]) -> str:
    return ", ".join(sorted(names))


_MULTIPLIES_LOGITS = frozenset({"hyperclovax"})


def logit_transform(config: PretrainedConfig) -> LogitTransform:
    """Logit scale (Cohere multiplies, Granite divides) and final softcap (Gemma) of an architecture.

    What an architecture does beside that is found by `model.probe`, and by the self-check.
    """
    scale = getattr(config, "logit_scale", None) or 1.0
    scaling = getattr(config, "logits_scaling", None) or 1.0
    return LogitTransform(
        scale=scale * scaling if config.model_type in _MULTIPLIES_LOGITS else scale / scaling,
        softcap=getattr(config, "final_logit_softcapping", None),
    )
