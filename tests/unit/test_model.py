"""Finding, checking and loading a model; what an architecture does is held to its stock forward in tests/parity."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig
from transformers.integrations import is_deepspeed_zero3_enabled

from dpo_dist.attention import AttentionNeeds
from dpo_dist.attention.interface import register
from dpo_dist.errors import ModelError
from dpo_dist.logprobs import LogitTransform, LogProbHead
from dpo_dist.model import ScoringModel, load_model, sharded_loading
from dpo_dist.pretrained import (
    SHARES_PROMPTS,
    WINDOW_IN_MASK,
    attention_needs,
    decide_sharing,
    digests,
    identity,
    load_config,
    logit_transform,
    resolve_folder,
)
from dpo_dist.pretrained import folder as model_file
from dpo_dist.pretrained.folder import weight_files
from tests.parity.oracle import llama_config, our_logps, random_example

KEY = "model.model_name_or_path"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Llama as save_pretrained writes it."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(llama_config()).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def load(folder: Path, dtype: torch.dtype = torch.float32, deepspeed_config: dict | None = None) -> ScoringModel:
    config = load_config(folder, trust_remote_code=False)
    return load_model(folder, config, register("sdpa"), dtype, deepspeed_config or {}, False, trust_remote_code=False)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# ---- the folder


def test_a_folder_is_itself(folder: Path, tmp_path: Path) -> None:
    assert resolve_folder(str(folder), KEY, None, tmp_path) == folder


def test_the_demo_model_has_a_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(model_file, "demo_model_folder", lambda cache_dir: cache_dir / "demo")
    assert resolve_folder("demo", KEY, None, tmp_path) == tmp_path / "demo"


def test_anything_else_is_downloaded_without_pickles(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path
) -> None:
    asked: list[tuple] = []

    def snapshot_download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, allow_patterns))
        return str(folder)

    monkeypatch.setattr(model_file, "snapshot_download", snapshot_download)
    assert resolve_folder("org/name", KEY, "abc", tmp_path) == folder
    ((name, revision, patterns),) = asked
    assert (name, revision) == ("org/name", "abc")
    assert "*.safetensors" in patterns
    assert not [pattern for pattern in patterns if pattern.endswith((".bin", ".pt", ".pth"))]


@pytest.mark.parametrize("error", [HFValidationError("bad name"), LocalEntryNotFoundError("offline"), OSError()])
def test_what_cannot_be_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception) -> None:
    def snapshot_download(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(model_file, "snapshot_download", snapshot_download)
    expected = rf"{KEY}=no/where is neither a folder here nor a model that can be downloaded \(.+\); check the path"
    with pytest.raises(ModelError, match=expected):
        resolve_folder("no/where", KEY, None, tmp_path)


@pytest.mark.parametrize(
    "name", ["./nowhere", "../nowhere", "/nowhere/model", "~/nowhere", "~nobody/x", "runs/no/model"]
)
def test_the_hub_is_not_asked_for_a_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model_file, "snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(
        ModelError, match=f"{KEY}={name} does not exist; give the folder save_pretrained wrote, or a hub"
    ):
        resolve_folder(name, KEY, None, tmp_path)


def test_a_file_is_no_model(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> None:
    monkeypatch.setattr(model_file, "snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(ModelError, match=f"{KEY}=.*model.safetensors is a file; give the folder it is in"):
        resolve_folder(str(folder / "model.safetensors"), KEY, None, tmp_path)


def test_a_folder_without_configuration_or_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=rf"{KEY}=.*tiny has no weights \(\*.safetensors\); pickled weights"):
        resolve_folder(str(folder), KEY, None, tmp_path)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=rf"{KEY}=.*tiny has no config.json; give the folder"):
        resolve_folder(str(folder), KEY, None, tmp_path)


@pytest.fixture
def in_parts(folder: Path) -> Path:
    """The same in several files, with their index, and once more under a name that nobody asks for."""
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    AutoModelForCausalLM.from_config(llama_config()).save_pretrained(folder, max_shard_size="10KB")
    return folder


def test_the_files_of_a_model_are_those_its_index_names(in_parts: Path, tmp_path: Path) -> None:
    assert resolve_folder(str(in_parts), KEY, None, tmp_path) == in_parts
    named = {path.name for path in in_parts.glob("model-*.safetensors")}
    assert len(named) > 5
    assert {path.name for path in weight_files(in_parts)} == named


def test_a_missing_part_is_found_before_anything_is_loaded(in_parts: Path, tmp_path: Path) -> None:
    part = sorted(in_parts.glob("model-*.safetensors"))[1]
    part.unlink()
    message = rf"{KEY}=.*tiny lacks 1 of the files that its model.safetensors.index.json names, such as {part.name}"
    with pytest.raises(ModelError, match=message):
        resolve_folder(str(in_parts), KEY, None, tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": null}', '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}']
)
def test_a_damaged_index_is_named(in_parts: Path, tmp_path: Path, text: str) -> None:
    (in_parts / "model.safetensors.index.json").write_text(text)
    with pytest.raises(
        ModelError, match=rf"{KEY}=.*tiny: its model.safetensors.index.json is damaged: it has no weight"
    ):
        resolve_folder(str(in_parts), KEY, None, tmp_path)


def test_files_that_nothing_names_are_no_model(in_parts: Path, tmp_path: Path) -> None:
    (in_parts / "model.safetensors.index.json").unlink()
    with pytest.raises(ModelError, match=r"tiny: it holds consolidated.safetensors, .*, and neither model.safetensors"):
        resolve_folder(str(in_parts), KEY, None, tmp_path)


def test_a_file_without_its_end_is_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged .*\(its last 3 bytes are missing\)"):
        identity(folder, folder.parent / "memory")


def test_identity_follows_what_the_model_computes(folder: Path) -> None:
    """Weights, the settings that make numbers of them, and the model's own code; no names."""
    before = identity(folder, folder.parent / "memory")
    edit_config(folder, transformers_version="0.0.1", _name_or_path="other", dtype="bfloat16", use_cache=False)
    edit_config(folder, pad_token_id=5, eos_token_id=[2, 7], initializer_range=0.5)
    assert identity(folder, folder.parent / "memory") == before
    found = {before}
    for changes in ({"rms_norm_eps": 1e-3}, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}):
        edit_config(folder, **changes)
        found.add(identity(folder, folder.parent / "memory"))
    (folder / "modeling_own.py").write_text("SCALE = 2\n")
    found.add(identity(folder, folder.parent / "memory"))
    assert len(found) == 4
    before = identity(folder, folder.parent / "memory")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 1e-6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert identity(folder, folder.parent / "memory") != before


def test_damaged_weights_are_named(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    for damaged in (b"", whole[:100], b"\xff" * 100, b"not a model"):
        (folder / "model.safetensors").write_bytes(damaged)
        with pytest.raises(ModelError, match=r"model\.safetensors is damaged or no safetensors file"):
            identity(folder, folder.parent / "memory")


# ---- its configuration


@pytest.mark.parametrize("text", ["{", '{"model_type": "nobody_knows"}', "{}"])
def test_a_configuration_that_cannot_be_used(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"its config.json cannot be used: .+"):
        load_config(folder, trust_remote_code=False)


def test_dropout_is_off_and_comes_back_on_export(folder: Path) -> None:
    edit_config(folder, attention_dropout=0.25, hidden_dropout_prob=0.5, router_jitter_noise=0.1, initializer_range=0.3)
    config = load_config(folder, trust_remote_code=False)
    was = {"attention_dropout": 0.25, "hidden_dropout_prob": 0.5, "router_jitter_noise": 0.1}
    assert config.disabled_dropout == was
    assert {name: getattr(config, name) for name in was} == dict.fromkeys(was, 0.0)
    assert config.initializer_range == 0.3
    model = load(folder)
    exported = model.export_config()
    assert {name: getattr(exported, name) for name in was} == was
    assert not hasattr(exported, "disabled_dropout")
    assert model.model.config.attention_dropout == 0.0  # the export is a copy


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(), LogitTransform()),
        (CohereConfig(logit_scale=0.25), LogitTransform(scale=0.25)),
        (GraniteConfig(logits_scaling=8.0), LogitTransform(scale=0.125)),
        (Gemma2Config(final_logit_softcapping=30.0), LogitTransform(softcap=30.0)),
        (Gemma2Config(final_logit_softcapping=None), LogitTransform()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_logit_transform(config, expected: LogitTransform) -> None:
    assert logit_transform(config) == expected


# ---- loading


def test_a_loaded_model_scores_and_keeps_the_parameters_names(folder: Path) -> None:
    model = load(folder, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.model.state_dict().keys() == load_file(folder / "model.safetensors").keys()
    assert isinstance(model.model.get_output_embeddings(), LogProbHead)
    logps = our_logps(model, [random_example(1, 5, [3, 4])], share=True)
    assert logps.dtype == torch.float32
    assert (logps < 0).all()


def test_missing_weights_are_an_error_not_random_numbers(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"lacks 1 weights of its architecture, such as model.layers.1.mlp.up_proj.weight"
    ):
        load(folder)


def test_weights_of_another_shape_are_an_error(folder: Path) -> None:
    edit_config(folder, intermediate_size=40)
    with pytest.raises(ModelError, match=r"tiny (cannot be loaded|lacks)"):
        load(folder)


def test_damaged_weights_are_an_error(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ModelError, match="tiny cannot be loaded"):
        load(folder)


def test_a_head_that_is_not_linear_is_refused(folder: Path) -> None:
    model = AutoModelForCausalLM.from_config(llama_config())
    model.set_output_embeddings(nn.Sequential())
    with pytest.raises(ModelError, match="the output head of architecture llama is a Sequential, not a linear layer"):
        ScoringModel(model)


# ---- ZeRO-3's global switch


def test_partitioned_loading_is_on_inside_and_off_after(folder: Path) -> None:
    stage3 = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}
    with sharded_loading(stage3):
        assert is_deepspeed_zero3_enabled()
    assert not is_deepspeed_zero3_enabled()
    with pytest.raises(KeyError), sharded_loading(stage3):
        raise KeyError
    assert not is_deepspeed_zero3_enabled()
    for other in ({}, {"zero_optimization": {"stage": 2}}):
        with sharded_loading(other):
            assert not is_deepspeed_zero3_enabled()


# ---- what a model needs of its attention kernel


@pytest.mark.parametrize("model_type", sorted(SHARES_PROMPTS))
def test_every_checked_architecture_tells_what_it_needs(model_type: str) -> None:
    needs = attention_needs(CONFIG_MAPPING[model_type]())
    assert needs.head_dim >= 32
    source = Path(transformers.__file__).parent / "models" / model_type.removesuffix("_text") / "__init__.py"
    (modeling,) = source.parent.glob("modeling_*.py")
    # A layer that hands sinks or a softcap over says so in its source.
    assert needs.has_sinks == ("s_aux=" in modeling.read_text())
    assert needs.has_softcap <= ("softcap=" in modeling.read_text())


def test_needs_of_unusual_models() -> None:
    assert attention_needs(CONFIG_MAPPING["llama"](hidden_size=512, num_attention_heads=8)) == AttentionNeeds(64)
    assert attention_needs(CONFIG_MAPPING["gemma2"]()) == AttentionNeeds(256, has_window=True, has_softcap=True)
    assert attention_needs(CONFIG_MAPPING["gpt_oss"]()) == AttentionNeeds(64, has_window=True, has_sinks=True)
    # Latent attention: 128 without position and 64 with; its values are narrower.
    assert attention_needs(CONFIG_MAPPING["deepseek_v3"]()) == AttentionNeeds(192, 128)
    assert not attention_needs(CONFIG_MAPPING["qwen2"](sliding_window=4)).has_window  # use_sliding_window is off
    assert attention_needs(
        CONFIG_MAPPING["qwen2"](sliding_window=4, use_sliding_window=True, max_window_layers=1)
    ).has_window


def test_architectures_whose_window_is_in_the_mask_alone() -> None:
    """By transformers' own source: it makes the mask of a window, and hands no kernel its width."""
    models = Path(transformers.__file__).parent / "models"
    found = set()
    for modeling in models.glob("*/modeling_*.py"):
        text = modeling.read_text()
        if "ForCausalLM" in text and "create_sliding_window_causal_mask" in text and "sliding_window=" not in text:
            found.add(modeling.parent.name)
    assert found == WINDOW_IN_MASK


def test_a_window_that_would_be_lost_is_refused_before_anything_is_loaded() -> None:
    phimoe = CONFIG_MAPPING["phimoe"]
    with pytest.raises(ModelError, match="phimoe cannot be packed: its sliding window of 64 tokens is not passed to"):
        decide_sharing(phimoe(sliding_window=64), "auto")
    assert not decide_sharing(phimoe(), "auto")[0]
    # Phi-3.5-MoE's own: as wide as the longest text that the model can read.
    assert not decide_sharing(phimoe(sliding_window=131072, max_position_embeddings=131072), "auto")[0]
    window = {"sliding_window": 64, "use_sliding_window": True}
    with pytest.raises(
        ModelError, match="qwen2_moe cannot be packed: its sliding window of 64 tokens is not passed to"
    ):
        decide_sharing(CONFIG_MAPPING["qwen2_moe"](**window), "auto")
    assert decide_sharing(CONFIG_MAPPING["qwen2_moe"](), "auto")[0]


def test_a_model_that_lacks_weights_is_named_once(folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if k != "model.norm.weight"}, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"^{KEY}=\S*tiny lacks 1 weights .* such as model\.norm\.weight") as caught:
        load(folder)
    assert str(caught.value).count(KEY) == 1


# ---- its identity


def test_one_changed_number_anywhere_is_another_model(folder: Path, tmp_path: Path) -> None:
    """40 rows of a matrix, none of them in its middle, were not noticed once."""
    memory = tmp_path / "memory"
    before = identity(folder, memory)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        changed = tensor.clone()
        changed.view(-1)[0] += 1
        save_file({**tensors, name: changed}, folder / "model.safetensors", metadata={"format": "pt"})
        assert identity(folder, memory) != before, name
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert identity(folder, memory) == before


def test_weights_are_read_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, memory = folder / "model.safetensors", tmp_path / "memory"
    monkeypatch.setattr("dpo_dist.pretrained.digests._SETTLED_NS", -1)  # as if it were old
    before = identity(folder, memory)
    read: list[Path] = []
    real = digests._digest_of
    monkeypatch.setattr("dpo_dist.pretrained.digests._digest_of", lambda one: read.append(one) or real(one))
    assert identity(folder, memory) == before and not read
    path.write_bytes(path.read_bytes())  # the same content at another time
    assert identity(folder, memory) == before and read == [path]


def test_weights_that_were_written_just_now_are_read_again(folder: Path, tmp_path: Path) -> None:
    """A second write within a tick of the clock would not show in size and time."""
    memory = tmp_path / "memory"
    identity(folder, memory)
    (kept,) = memory.glob("*.json") if list(memory.glob("*.json")) else (None,)
    assert kept is None or json.loads(kept.read_text())["files"] == {}


@pytest.mark.parametrize("text", ["", "[]", '{"model.safetensors": 1}', '{"model.safetensors": [[1], 2]}'])
def test_a_damaged_memory_is_no_obstacle(folder: Path, tmp_path: Path, text: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("dpo_dist.pretrained.digests._SETTLED_NS", -1)
    memory = tmp_path / "memory"
    before = identity(folder, memory)
    (kept,) = memory.glob("*.json")
    kept.write_text(text)
    assert identity(folder, memory) == before
    assert json.loads(kept.read_text())["files"]["model.safetensors"][1]


def test_a_cache_that_cannot_be_written_is_no_obstacle(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert identity(folder, tmp_path / "file" / "memory") == identity(folder, tmp_path / "memory")
