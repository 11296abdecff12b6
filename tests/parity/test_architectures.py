"""Every architecture that shares prompts: our packed forward against its own stock forward, one sequence at a time.

A stock model rounds to float32 inside (norms, eager softmax, rotary tables), also when it computes in float64:
agreement is to about 1e-6 nats. One token seen too much or too little changes these models by 0.01 to 10 nats.
"""

from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, PretrainedConfig

from dpo_dist.errors import ConfigError, ModelError
from dpo_dist.pretrained import PACKABLE_ROPE, SHARES_PROMPTS, decide_sharing
from tests.parity.oracle import (
    INITIALIZER_RANGE,
    VOCABULARY,
    gradients,
    naive_logps,
    objective,
    our_logps,
    random_example,
    stock_and_ours,
)

EXAMPLES = [random_example(1, 7, [5, 1, 9]), random_example(2, 1, [4, 12]), random_example(3, 13, [1, 6])]
WINDOW = 5  # shorter than prompts and completions, so that it cuts both

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": INITIALIZER_RANGE,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT_ATTENTION = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
ROUTED = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
MIXED_LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
QWEN_WINDOW = {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": WINDOW}


@dataclass(frozen=True)
class Case:
    """A tiny model of one architecture: what it needs to exist, and the features that must be seen to act."""

    shape: dict[str, Any] = field(default_factory=dict)
    features: dict[str, Any] = field(default_factory=dict)


CASES = {
    "apertus": Case(),
    "arcee": Case(),
    "cohere": Case(features={"logit_scale": 0.5}),
    "cohere2": Case(features={"logit_scale": 0.5, **MIXED_LAYERS}),
    "deepseek_v2": Case(shape={**EXPERTS, **ROUTED, **LATENT_ATTENTION}),
    "deepseek_v3": Case(shape={**EXPERTS, **ROUTED, **LATENT_ATTENTION}),
    "ernie4_5": Case(),
    "exaone4": Case(features=MIXED_LAYERS),
    "gemma": Case(),
    "gemma2": Case(features={**MIXED_LAYERS, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3_text": Case(features={**MIXED_LAYERS, "query_pre_attn_scalar": 16}),
    "glm": Case(),
    "glm4": Case(),
    "glm4_moe": Case(shape={**EXPERTS, **ROUTED}),
    "gpt2": Case(),
    "gpt_neox": Case(),
    "gpt_oss": Case(shape=EXPERTS, features={"sliding_window": WINDOW}),
    "granite": Case(features={"logits_scaling": 4.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5}),
    "granitemoe": Case(shape=EXPERTS, features={"logits_scaling": 4.0, "attention_multiplier": 0.2}),
    "helium": Case(),
    "llama": Case(shape={"attention_bias": True}),
    "ministral": Case(features=MIXED_LAYERS),
    "mistral": Case(features={"sliding_window": WINDOW}),
    "mixtral": Case(shape=EXPERTS, features={"sliding_window": WINDOW}),
    "nanochat": Case(features={"final_logit_softcapping": 3.0}),
    "olmo": Case(features={"clip_qkv": 0.5}),
    "olmo2": Case(),
    "olmo3": Case(features=MIXED_LAYERS),
    "olmoe": Case(shape=EXPERTS),
    "phi": Case(),
    "phi3": Case(features={"sliding_window": WINDOW}),
    "qwen2": Case(features=QWEN_WINDOW),
    "qwen2_moe": Case(shape={**EXPERTS, "shared_expert_intermediate_size": 24}),
    "qwen3": Case(features=QWEN_WINDOW),
    "qwen3_moe": Case(shape=EXPERTS, features={"sliding_window": WINDOW, "use_sliding_window": True}),
    "seed_oss": Case(),
    "smollm3": Case(shape={"no_rope_layers": [1, 0]}, features=QWEN_WINDOW),
    "starcoder2": Case(features={"sliding_window": WINDOW}),
}


def build(model_type: str, **settings: Any) -> PretrainedConfig:
    config = CONFIG_MAPPING[model_type](**{**SMALL, **settings})
    config._experts_implementation = "eager"  # the grouped kernels have no float64
    return config


def assert_equal_gradients(ours: dict[str, torch.Tensor], stock: dict[str, torch.Tensor], rel: float) -> None:
    assert ours.keys() == stock.keys()
    # Some gradients are zero but for rounding (a key's bias adds the same to every score): hold those to the largest.
    largest = max(float(gradient.abs().max()) for gradient in stock.values())
    for name, gradient in stock.items():
        allowed = rel * float(gradient.abs().max()) + 0.01 * rel * largest
        assert float((ours[name] - gradient).abs().max()) <= allowed, name


def assert_matches_stock(
    config: PretrainedConfig, dtype: torch.dtype = torch.float64, abs_nats: float = 2e-5
) -> torch.Tensor:
    """Both layouts, values and gradients; returns the stock log-probabilities."""
    stock, ours = stock_and_ours(config, dtype)
    expected = naive_logps(stock, EXAMPLES)
    expected_gradients = gradients(stock, objective(expected))
    for share in (True, False):
        logps = our_logps(ours, EXAMPLES, share)
        torch.testing.assert_close(logps, expected, rtol=0, atol=abs_nats)
        assert_equal_gradients(gradients(ours, objective(logps)), expected_gradients, rel=5 * abs_nats)
    return expected.detach()


def assert_differ(logps: torch.Tensor, config: PretrainedConfig) -> None:
    """The stock model of another configuration, with the same weights, gives visibly other values."""
    with torch.no_grad():
        others = naive_logps(stock_and_ours(config)[0], EXAMPLES)
    assert float((logps - others).abs().max()) > 0.01


def test_every_listed_architecture_has_a_case() -> None:
    assert CASES.keys() == SHARES_PROMPTS


@pytest.mark.parametrize("model_type", sorted(CASES))
def test_equals_the_stock_forward(model_type: str) -> None:
    case = CASES[model_type]
    config = build(model_type, **case.shape, **case.features)
    assert decide_sharing(config, "auto")[0]
    logps = assert_matches_stock(config)
    if case.features:
        assert_differ(logps, build(model_type, **case.shape))


@pytest.mark.parametrize("feature", ["sliding_window", "attn_logit_softcapping", "final_logit_softcapping"])
def test_each_feature_of_gemma2_acts_alone(feature: str) -> None:
    off = {"sliding_window": 512, "attn_logit_softcapping": None, "final_logit_softcapping": None}
    logps = assert_matches_stock(build("gemma2", **{**off, feature: CASES["gemma2"].features[feature]}))
    assert_differ(logps, build("gemma2", **off))


ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 100.0},
    "linear": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 100.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 100.0, "factor": 64.0, "original_max_position_embeddings": 8},
}


def test_every_packable_rope_has_a_case() -> None:
    assert ROPES.keys() == PACKABLE_ROPE


@pytest.mark.parametrize("rope_type", sorted(ROPES))
def test_rope(rope_type: str) -> None:
    config = build("llama", rope_parameters=ROPES[rope_type])
    assert config.rope_parameters["rope_type"] == rope_type
    assert decide_sharing(config, "auto")[0]
    logps = assert_matches_stock(config)
    if rope_type != "default":
        assert_differ(logps, build("llama", rope_parameters=ROPES["default"]))


def test_experts_in_the_kernel_that_training_uses() -> None:
    """float32 takes the grouped matrix product; float64 above cannot."""
    config = build("mixtral", **EXPERTS)
    config._experts_implementation = "grouped_mm"
    assert_matches_stock(config, torch.float32, abs_nats=2e-4)


# ---- refused, with the reason


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0] * 48,
    "long_factor": [2.0] * 48,
    "original_max_position_embeddings": 8,
    "factor": 64.0,
}


@pytest.mark.parametrize(
    ("model_type", "settings", "reason"),
    [
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}},
            "rope type dynamic",
        ),
        ("phi3", {"rope_parameters": LONGROPE}, "rope type longrope"),
        ("mamba", {}, "carry state"),
        ("jamba", {}, "carry state"),
        ("falcon_h1", {}, "carry state"),
        ("lfm2", {}, "carry state"),
        ("qwen3_next", {}, "linear_attention carry state"),
        ("llama4_text", {}, "chunked_attention carry state"),
    ],
)
@pytest.mark.parametrize("requested", ["auto", "off"])
def test_refuses_what_packing_would_change(model_type: str, settings: dict, reason: str, requested: str) -> None:
    config = CONFIG_MAPPING[model_type](**settings)
    with pytest.raises(ModelError, match=f"architecture {model_type} cannot be packed: .*{reason}"):
        decide_sharing(config, requested)


def test_refuses_a_rope_of_one_kind_of_layer() -> None:
    """Gemma 3 keeps one set of rope parameters for every kind of layer."""
    ropes = {"sliding_attention": ROPES["default"], "full_attention": {"rope_type": "dynamic", "factor": 2.0}}
    config = build("gemma3_text")
    config.rope_parameters = ropes
    with pytest.raises(ModelError, match="rope type dynamic"):
        decide_sharing(config, "auto")


def test_unlisted_architecture_packs_without_sharing() -> None:
    config = build("persimmon")
    share, why = decide_sharing(config, "auto")
    assert not share
    assert "persimmon is not on the list" in why
    assert_matches_stock(config)
    with pytest.raises(ConfigError, match=r"model\.prefix_sharing=on: architecture persimmon is not on the list"):
        decide_sharing(config, "on")


@pytest.mark.parametrize("model_type", ["stablelm", "nemotron"])
def test_stops_when_the_layout_does_not_reach_attention(model_type: str) -> None:
    """These drop keyword arguments on the way: every completion would see all packed before it, by up to 22 nats."""
    _, ours = stock_and_ours(build(model_type))
    with pytest.raises(ModelError, match=f"{model_type} cannot be packed: 0 of its 2 layers"):
        our_logps(ours, EXAMPLES, share=False)


def test_stops_when_a_layer_is_no_attention() -> None:
    """lfm2 is refused by name; were its name unknown, its convolution would not be reached by the layout."""
    _, ours = stock_and_ours(build("lfm2", layer_types=["conv", "full_attention"]))
    with pytest.raises(ModelError, match="lfm2 cannot be packed: 1 of its 2 layers"):
        our_logps(ours, EXAMPLES, share=False)


def test_stops_when_a_window_would_be_lost() -> None:
    """Qwen2-MoE's window acts through the mask alone, which a packed forward does not have: off by 4 nats here."""
    _, ours = stock_and_ours(build("qwen2_moe", **CASES["qwen2_moe"].shape, **QWEN_WINDOW))
    with pytest.raises(ModelError, match="Qwen2MoeAttention has a sliding window and does not pass it to its kernel"):
        our_logps(ours, EXAMPLES, share=True)


def test_sharing_can_be_switched_off() -> None:
    assert decide_sharing(build("llama"), "off") == (False, "as configured")
    assert decide_sharing(build("llama"), "on")[0]


# ---- without a layout: generate, export


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt_oss"])
def test_generates_as_stock_does(model_type: str) -> None:
    case = CASES[model_type]
    stock, ours = stock_and_ours(build(model_type, **case.shape, **case.features))
    prompt = torch.tensor([EXAMPLES[0].prompt_ids])
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for use_cache in (True, False):
        expected = stock.generate(prompt, use_cache=use_cache, **settings)
        assert torch.equal(ours.model.generate(prompt, use_cache=use_cache, **settings), expected)
    assert expected.shape == (1, 7 + 12)


def test_an_explicit_mask_is_obeyed_without_a_layout() -> None:
    stock, ours = stock_and_ours(build("llama"))
    ids = torch.tensor([[5, 6, 7, 8]])
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    mask[2, 0] = False
    additive = torch.zeros(4, 4, dtype=torch.float64).masked_fill(~mask, -torch.inf)[None, None]
    expected = stock(input_ids=ids, attention_mask=additive).logits
    torch.testing.assert_close(
        ours.model(input_ids=ids, attention_mask=mask[None, None]).logits, expected, rtol=1e-5, atol=1e-5
    )
    assert not torch.allclose(expected, stock(input_ids=ids).logits)


@pytest.mark.parametrize("model_type", ["llama", "gpt_oss"])
def test_exported_configuration_holds_nothing_of_ours(model_type: str, tmp_path) -> None:
    _, ours = stock_and_ours(build(model_type, **CASES[model_type].shape))
    before = deepcopy(ours.model.config)
    ours.model.config.disabled_dropout = {"attention_dropout": 0.1}
    ours.export_config().save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert "dpo_dist" not in text
    assert "disabled_dropout" not in text
    assert '"attention_dropout": 0.1' in text
    assert ours.model.config.attention_dropout == before.attention_dropout == 0.0
