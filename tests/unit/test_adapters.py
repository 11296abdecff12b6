"""Adapters that cannot be: what is wrong is said with the key and its value, before a model is loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dpo_dist.adapters import attach_adapter, export_merged, require_adapter
from dpo_dist.adapters.export import adapter_tensors
from dpo_dist.attention.interface import register
from dpo_dist.batch import build_micro_batch
from dpo_dist.config import AdapterConfig
from dpo_dist.errors import CheckpointError, ConfigError, ModelError
from dpo_dist.model import ScoringModel, base_name, four_bits, load_model
from dpo_dist.pretrained import adapter_kind, is_prompt_learning, load_config
from tests.parity.adapter_cases import CASES, examples_of_step, save_base, save_start

# PEFT asks transformers for what it calls deprecated, and warns of what is meant.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("UserWarning", "FutureWarning")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    save_base(folder / "base", tied=False)
    save_start(folder, "lora")
    save_start(folder, "prompt_tuning")
    return folder


def load(folder: Path, checkpointing: bool = False, **settings: Any) -> ScoringModel:
    base = folder / "base"
    config = load_config(base, trust_remote_code=False)
    model = load_model(base, config, register("sdpa"), torch.float32, {}, checkpointing, False)
    return attach_adapter(model, AdapterConfig(**settings), str(base), 7, 5, {})


def require(folder: Path, checkpointing: bool = False, total_steps: int = 5, **settings: Any) -> None:
    config = load_config(folder / "base", trust_remote_code=False)
    require_adapter(AdapterConfig(**settings), config, checkpointing, False, total_steps)


MISTAKES = {
    "head": (
        {"peft_type": "lora", "lora_target_modules": ["q_proj", "lm_head"]},
        r"adapter\.lora_target_modules=lm_head is the output head, .* chunk by chunk",
    ),
    "unknown target": (
        {"peft_type": "lora", "lora_target_modules": ["q_proj", "query"]},
        r"adapter\.lora_target_modules=query matches no layer of this model; it has down_proj, gate_proj, k_proj",
    ),
    "no target": (
        {"peft_type": "lora", "lora_target_modules": []},
        r"adapter\.lora_target_modules=\[\] names no layer",
    ),
    "no linear layer": (
        {"peft_type": "adalora", "lora_target_modules": ["embed_tokens"]},
        r"adapter\.lora_target_modules=embed_tokens matches model\.embed_tokens, a Embedding",
    ),
    "unknown module": (
        {"peft_type": "lora", "lora_modules_to_save": ["wte"]},
        r"adapter\.lora_modules_to_save=wte matches no module of this model; it has .*embed_tokens",
    ),
    "layer of both kinds": (
        {"peft_type": "lora", "lora_modules_to_save": ["mlp"]},
        r"adapter\.lora_modules_to_save=mlp is trained whole, and model\.layers\.0\.mlp\.gate_proj in it gets",
    ),
    "whole decoder": (
        {"peft_type": "lora", "lora_target_modules": ["q_proj"], "lora_modules_to_save": ["model"]},
        r"adapter\.lora_modules_to_save=model is the whole decoder",
    ),
    "list": (
        {"peft_type": "lora", "lora_target_modules": ["q_proj"], "lora_modules_to_save": ["layers"]},
        r"adapter\.lora_modules_to_save=layers matches model\.layers, which is a list",
    ),
    "ranks": (
        {"peft_type": "adalora", "init_r": 4, "target_r": 4},
        r"adapter\.init_r=4 must be larger than adapter\.target_r=4",
    ),
    "schedule": (
        {"peft_type": "adalora", "tinit": 3, "tfinal": 2},
        r"adapter\.tinit=3 and adapter\.tfinal=2 leave none of the 5 updates",
    ),
    "text": (
        {"peft_type": "prompt_tuning", "prompt_tuning_init_text": "Be kind."},
        r"adapter\.prompt_tuning_init_text='Be kind\.' needs a tokenizer",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_before_and_while_loading(folder, mistake):
    settings, message = MISTAKES[mistake]
    with pytest.raises(ConfigError, match=message):
        require(folder, **settings)
    with pytest.raises(ConfigError, match=message):
        load(folder, **settings)


def test_prefix_tuning_does_not_recompute(folder):
    for way in (require, load):
        with pytest.raises(
            ConfigError, match=r"model\.gradient_checkpointing=true does not go with adapter\.peft_type"
        ):
            way(folder, checkpointing=True, peft_type="prefix_tuning")


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.start is None and not case.tied])
def test_what_is_possible_is_let_through(folder, name):
    require(folder, **CASES[name].adapter)


def test_a_good_adapter_is_let_through(folder):
    for name in ("lora", "prompt_tuning"):
        require(folder, adapter_name_or_path=str(folder / f"start-{name}"))


# ---- adapters on disk


def spoiled(folder: Path, out: Path, name: str = "lora", **changes: Any) -> Path:
    """A copy of a good adapter with other settings."""
    out.mkdir()
    values = json.loads((folder / f"start-{name}" / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps(values | changes))
    (out / "adapter_model.safetensors").write_bytes((folder / f"start-{name}/adapter_model.safetensors").read_bytes())
    return out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task_type": "SEQ_CLS"}, "its task_type is SEQ_CLS"),
        ({"peft_type": "IA3"}, "an adapter of type IA3 cannot be trained here; supported are LORA"),
        ({"peft_type": "P_TUNING"}, "holds what its encoder gave, not the encoder"),
        ({"bias": "all"}, "bias=all of its adapter_config.json is not supported, only bias=none"),
        ({"trainable_token_indices": [3]}, r"trainable_token_indices=\[3\] of its"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa changes the base model's weights"),
        ({"target_modules": ["lm_head", "q_proj"]}, "target_modules=lm_head is the output head"),
        ({"target_modules": ["c_attn"]}, "target_modules=c_attn matches no layer"),
        ({"target_modules": ["q_proj"]}, "adapter of another base model .* belongs to no layer"),
        ({"r": 5}, r"adapter of another base model .* has shape \(3, 34\), and this model needs \(5, 34\)"),
        ({"modules_to_save": ["norm"]}, "or is not complete: it has no base_model.model.model.layers.0.input"),
    ],
)
def test_an_adapter_that_does_not_fit(folder, tmp_path, changes, message):
    path = spoiled(folder, tmp_path / "adapter", **changes)
    for way in (require, load):
        with pytest.raises(
            (ModelError, ConfigError), match=f"adapter.adapter_name_or_path={path}.*{message}"
        ) as raised:
            way(folder, adapter_name_or_path=str(path))
        assert raised.value.exit_code == 2


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("adapter_config.json", None, "has no adapter_config.json"),
        ("adapter_model.safetensors", None, "has no adapter_model.safetensors.*pickled weights"),
        ("adapter_config.json", b"{", "adapter_config.json is damaged"),
        ("adapter_config.json", b"[]", "holds no settings"),
        ("adapter_model.safetensors", b"xx", "adapter_model.safetensors is damaged"),
        ("adapter_config.json", b'{"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": "x"}', "adapter_name_or_path"),
    ],
)
def test_damaged_adapters(folder, tmp_path, file, content, message):
    path = spoiled(folder, tmp_path / "adapter")
    (path / file).unlink()
    if content is not None:
        (path / file).write_bytes(content)
    for way in (require, load):
        with pytest.raises((ModelError, ConfigError), match=message) as raised:
            way(folder, adapter_name_or_path=str(path))
        assert raised.value.exit_code == 2


def test_an_adapter_that_is_not_there(folder):
    with pytest.raises(ModelError, match=r"adapter\.adapter_name_or_path=/nowhere does not exist"):
        load(folder, adapter_name_or_path="/nowhere")


def test_numbers_that_are_none(folder, tmp_path):
    path = spoiled(folder, tmp_path / "adapter")
    tensors = load_file(path / "adapter_model.safetensors")
    name = sorted(tensors)[0]
    tensors[name][0, 0] = float("nan")
    save_file(tensors, path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="is not finite"):
        load(folder, adapter_name_or_path=str(path))


def test_kinds(folder):
    assert adapter_kind(AdapterConfig()) is None and not is_prompt_learning(AdapterConfig())
    assert adapter_kind(AdapterConfig(adapter_name_or_path=str(folder / "start-lora"))) == "lora"
    assert is_prompt_learning(AdapterConfig(adapter_name_or_path=str(folder / "start-prompt_tuning")))


# ---- the model without its adapter


def switches(model: ScoringModel) -> list[tuple[Any, ...]]:
    names = ("training", "_active_adapter", "_disable_adapters")
    return [tuple(getattr(module, name, None) for name in names) for module in model.modules()]


@pytest.mark.parametrize("start", [None, "lora"])
def test_everything_is_as_before_after_an_error(folder, start):
    settings = {"peft_type": "lora", "lora_modules_to_save": ["norm"]}
    if start is not None:
        settings = {"adapter_name_or_path": str(folder / f"start-{start}")}
    model = load(folder, **settings).train()
    model.model.model.layers[1].eval()
    batch = build_micro_batch(examples_of_step(0), [0, 2, 5, 7], True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
        policy = model(batch)
        state = switches(model)
        trained = [p.requires_grad for p in model.parameters()]
        with pytest.raises(ZeroDivisionError), model.as_reference():
            assert not torch.equal(model(batch), policy)
            _ = 1 / 0
        assert torch.equal(model(batch), policy)
    assert state == switches(model) and trained == [p.requires_grad for p in model.parameters()]


def test_the_base_models_names_can_be_found_again(folder):
    model = load(folder, peft_type="lora", use_dora=True, lora_modules_to_save=["embed_tokens", "lm_head", "norm"])
    names = {base_name(name) for name, _ in model.model.named_parameters()}
    assert names - {None} == load_file(folder / "base" / "model.safetensors").keys()


@pytest.mark.parametrize("name", ["lora", "adalora", "p_tuning"])
def test_first_values_come_from_the_seed_alone(folder, name):
    first, again = (dict(load(folder, **CASES[name].adapter).named_parameters()) for _ in range(2))
    torch.manual_seed(99)
    third = dict(load(folder, **CASES[name].adapter).named_parameters())
    assert all(torch.equal(p, again[n]) and torch.equal(p, third[n]) for n, p in first.items())
    assert any("lora" in n or "prompt" in n for n, p in first.items() if p.requires_grad)


@pytest.mark.parametrize("name", ["prefix_tuning", "prompt_tuning", "p_tuning"])
def test_virtual_tokens_before_shared_prompts_own_prompts_and_nothing(folder, name):
    model = load(folder, **CASES[name].adapter)
    examples, offsets = examples_of_step(0), [0, 2, 5, 7]
    with torch.no_grad():
        shared, own = (model(build_micro_batch(examples, offsets, share)) for share in (True, False))
        assert torch.allclose(shared, own, atol=1e-5)
        assert len(model(build_micro_batch([], [], True))) == 0
        with model.as_reference():
            assert not torch.allclose(model(build_micro_batch(examples, offsets, True)), shared, atol=1e-2)


# ---- four bits


def test_four_bits_need_the_package(monkeypatch):
    config = AdapterConfig(peft_type="lora", load_in_4bit=True, bnb_4bit_quant_type="fp4", use_bnb_nested_quant=True)
    found = four_bits(config, torch.bfloat16)
    assert found is not None and found.bnb_4bit_quant_type == "fp4" and found.bnb_4bit_use_double_quant
    assert found.bnb_4bit_quant_storage == found.bnb_4bit_compute_dtype == torch.bfloat16
    assert four_bits(AdapterConfig(peft_type="lora"), torch.bfloat16) is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"adapter\.load_in_4bit=true needs the package bitsandbytes"):
        four_bits(config, torch.bfloat16)


def test_four_bits_are_for_lora_and_frozen_layers(folder):
    with pytest.raises(ConfigError, match=r"adapter\.load_in_4bit=true goes with an adapter of kind lora only"):
        four_bits(AdapterConfig(peft_type="adalora", load_in_4bit=True), torch.float32)
    settings = {"lora_target_modules": ["v_proj"], "lora_modules_to_save": ["q_proj"], "load_in_4bit": True}
    adapter = AdapterConfig(peft_type="lora", **settings)
    config = load_config(folder / "base", trust_remote_code=False)
    quantised = four_bits(adapter, torch.float32)
    model = load_model(folder / "base", config, register("sdpa"), torch.float32, {}, False, False, quantised)
    with pytest.raises(ConfigError, match=r"q_proj\.modules_to_save\.default\.weight is kept in 4 bits"):
        attach_adapter(model, adapter, "base", 7, 5, {})


def test_sizes_that_four_bits_cannot_hold(tmp_path):
    base = save_base(tmp_path / "base", tied=False, intermediate=33)
    config = load_config(base, trust_remote_code=False)
    quantised = four_bits(AdapterConfig(peft_type="lora", load_in_4bit=True), torch.float32)
    with pytest.raises(ModelError, match=r"adapter\.load_in_4bit=true the number of weights .* a multiple of 8"):
        load_model(base, config, register("sdpa"), torch.float32, {}, False, False, quantised)


# ---- export


def test_virtual_tokens_cannot_be_merged(folder, tmp_path):
    with pytest.raises(ConfigError, match="PROMPT_TUNING consists of virtual tokens and cannot be merged"):
        export_merged(folder / "base", folder / "start-prompt_tuning", tmp_path / "out", torch.float32)
    assert not list(tmp_path.iterdir())


def test_an_adapter_of_another_base_is_not_merged(folder, tmp_path):
    path = spoiled(folder, tmp_path / "adapter", r=5)
    with pytest.raises(ModelError, match="cannot be merged into"):
        export_merged(folder / "base", path, tmp_path / "out", torch.float32)


def test_an_incomplete_adapter_is_not_merged(folder, tmp_path):
    path = spoiled(folder, tmp_path / "adapter")
    tensors = load_file(path / "adapter_model.safetensors")
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="missing adapter keys"):
        export_merged(folder / "base", path, tmp_path / "out", torch.float32)


def test_what_was_not_gathered_is_not_written(folder):
    settings = load(folder, peft_type="lora").adapter.config
    with pytest.raises(CheckpointError, match="is empty; it was not gathered"):
        adapter_tensors(settings, {"model.layers.0.q_proj.lora_A.default.weight": torch.empty(0)})
    with pytest.raises(CheckpointError, match="there is no tensor of an adapter"):
        adapter_tensors(settings, {"model.norm.weight": torch.ones(3)})


def test_plain_peft_makes_the_same_layers(folder):
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    plain = get_peft_model(base, LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM"))
    ours = load(folder, peft_type="lora", lora_r=3)
    theirs = {n.removeprefix("base_model.model."): p.shape for n, p in plain.named_parameters() if p.requires_grad}
    assert {n: p.shape for n, p in ours.model.named_parameters() if p.requires_grad} == theirs
