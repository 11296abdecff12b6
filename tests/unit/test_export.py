"""Exported models: equal to what was trained, complete, loadable by transformers; from a live engine and offline."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from dpo_dist.checkpoint import CheckpointStore, export_checkpoint, export_model, save_shards, write_assets
from dpo_dist.checkpoint import export as exporting
from dpo_dist.checkpoint.files import claim_staging
from dpo_dist.checkpoint.saved_states import full_parameters
from dpo_dist.distributed import Ranks
from dpo_dist.errors import CheckpointError, ConfigError, FolderInUseError
from tests.run_states import run_state
from tests.tiny_engine import QUIET, full_parameters_of, make_engine, only_rank, save_engine, tiny_config, train

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]
ALONE = Ranks(0, 1, 0, torch.device("cpu"))
TOKENS = torch.arange(1, 24).reshape(1, -1)


def keys_in(folder: Path) -> set[str]:
    keys = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            keys |= set(file.keys())
    return keys


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config())


def export(out: Path, model: Any, parameters: Any = None, **changes: Any) -> Path:
    """The model without an engine around it."""
    pairs = model.named_parameters() if parameters is None else parameters
    return export_model(out, iter(pairs), ALONE, model.config, **changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@torch.no_grad()
def test_export_equals_the_trained_policy(tmp_path: Path, stage: int, dtype: torch.dtype) -> None:
    tied = stage % 2 == 0
    engine = make_engine(stage, dtype, tiny_config(tied))
    with torch.enable_grad():
        train(engine, 2, seed=1)
    checkpoint = save_engine(CheckpointStore(tmp_path, only_rank()), engine, run_state(), dtype)
    live = export_model(
        tmp_path / "model",
        full_parameters_of(engine),
        only_rank(),
        engine.module.model.config,
        generation_config=engine.module.model.generation_config,
        dtype=dtype,
    )
    offline = export_checkpoint(checkpoint, tmp_path / "exported")

    assert {path.name for path in live.iterdir()} == {path.name for path in offline.iterdir()}
    for path in live.iterdir():
        assert path.read_bytes() == (offline / path.name).read_bytes(), path.name
    loaded, report = AutoModelForCausalLM.from_pretrained(offline, output_loading_info=True)
    assert not any(report.values()), report
    assert loaded.dtype == dtype
    engine.eval()
    assert torch.equal(loaded(TOKENS).logits, engine(TOKENS))
    untrained = LlamaForCausalLM(tiny_config(tied)).to(dtype)
    assert not torch.equal(loaded(TOKENS).logits, untrained(TOKENS).logits)
    assert ("lm_head.weight" in keys_in(live)) is not tied


@pytest.mark.parametrize("stage", [2, 3])
def test_frozen_parameters_and_buffers_are_in_the_checkpoint(tmp_path: Path, stage: int) -> None:
    engine = make_engine(stage, torch.float32, prepare=freeze_some)
    train(engine, 1, seed=1)
    save_shards(engine, tmp_path)
    found = dict(full_parameters(tmp_path, torch.float32))
    assert torch.equal(found.pop("kept"), torch.arange(5))
    expected = dict(full_parameters_of(engine))
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert found.keys() - expected.keys() <= {"lm_head.weight"}


def freeze_some(model: LlamaForCausalLM) -> None:
    model.model.norm.requires_grad_(False)
    model.model.layers[0].mlp.requires_grad_(False)
    model.register_buffer("kept", torch.arange(5))


# ---- the folder


def test_shards_and_index(tmp_path: Path, model: LlamaForCausalLM) -> None:
    folder = export(tmp_path / "m", model, max_shard_bytes=10_000)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 2
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert {name: load_file(folder / name).keys() for name in files} == {
        name: {key for key, file in index["weight_map"].items() if file == name} for name in files
    }
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in model.parameters())
    assert all((folder / name).stat().st_size < 12_000 for name in files)
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "phi3"])
def test_files_have_the_names_of_the_family(tmp_path: Path, family: str) -> None:
    """Fused experts are taken apart again: other programs read the names of the base model's files."""
    sizes = {"hidden_size": 32, "intermediate_size": 16, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 40, "pad_token_id": 0}
    sizes |= {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
    folder = export(tmp_path / "m", model, max_shard_bytes=4_000)
    model.save_pretrained(tmp_path / "expected")
    assert keys_in(folder) == keys_in(tmp_path / "expected")
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())


def test_config_is_the_base_models(tmp_path: Path, model: LlamaForCausalLM) -> None:
    model.config._attn_implementation = "dpo_dist"
    folder = export(tmp_path / "m", model, dtype=torch.float32)
    text = (folder / "config.json").read_text()
    assert "dpo_dist" not in text and "attn_implementation" not in text
    values = json.loads(text)
    assert values["architectures"] == ["LlamaForCausalLM"]
    assert values["dtype"] == "float32"
    # The configuration in use is left alone.
    assert model.config._attn_implementation == "dpo_dist"


def test_attention_name_is_dropped_wherever_it_stands(tmp_path: Path, model: LlamaForCausalLM) -> None:
    model.config.to_diff_dict = lambda: {"model_type": "llama", "attn_implementation": "dpo_dist"}
    write_assets(tmp_path, model.config)
    assert json.loads((tmp_path / "config.json").read_text()).keys() == {"model_type"}


def test_generation_config_that_transformers_would_refuse_to_save(tmp_path: Path, model: LlamaForCausalLM) -> None:
    generation = GenerationConfig(do_sample=False)
    generation.temperature = 0.6
    folder = export(tmp_path / "m", model, generation_config=generation)
    assert json.loads((folder / "generation_config.json").read_text())["temperature"] == 0.6


def test_tokenizer_travels_through_the_checkpoint(tmp_path: Path) -> None:
    words = Tokenizer(WordLevel({"<unk>": 0, "</s>": 1, "yes": 2, "no": 3}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    engine = make_engine(0, torch.float32)
    checkpoint = CheckpointStore(tmp_path, only_rank()).save(
        run_state(),
        lambda folder: save_shards(engine, folder),
        lambda folder: write_assets(folder / "model_assets", engine.module.model.config, tokenizer),
    )
    loaded = AutoTokenizer.from_pretrained(export_checkpoint(checkpoint, tmp_path / "out"))
    assert loaded.eos_token == "</s>" and loaded.convert_tokens_to_ids("no") == 3
    assert loaded.chat_template == tokenizer.chat_template


def test_a_new_model_replaces_the_old_one(tmp_path: Path, model: LlamaForCausalLM) -> None:
    export(tmp_path / "m", model, max_shard_bytes=10_000)
    export(tmp_path / "m", model)
    assert {path.name for path in (tmp_path / "m").iterdir()} == {"config.json", "model.safetensors"}
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_tensor_may_change_after_it_was_handed_over(tmp_path: Path, model: LlamaForCausalLM) -> None:
    expected = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}

    def gathered() -> Iterator[tuple[str, Tensor]]:
        buffer = torch.empty(100_000)
        for name, tensor in expected.items():
            view = buffer[: tensor.numel()].view(tensor.shape)
            yield name, view.copy_(tensor)

    saved = load_file(export(tmp_path / "m", model, gathered()) / "model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())


# ---- what is not a whole model


NORM = "model.norm.weight"
FAULTS = {
    "missing": (lambda p: p.pop(NORM), rf"1 parameters are missing, first {NORM}"),
    "empty": (lambda p: p.update({NORM: torch.empty(0)}), rf"{NORM} has shape \(0,\), expected \(30,\)"),
    "shape": (lambda p: p.update({NORM: torch.zeros(31)}), rf"{NORM} has shape \(31,\), expected \(30,\)"),
    "unknown": (lambda p: p.update({"model.nrm": torch.zeros(30)}), "model.nrm is not a parameter of LlamaForCausalLM"),
    "not gathered": (lambda p: p.update({NORM: None}), f"{NORM} was not gathered"),
    "untied": (lambda p: p.update({"lm_head.weight": torch.zeros(67, 30)}), "differs from model.embed_tokens.weight"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_incomplete_model_is_not_written(tmp_path: Path, model: LlamaForCausalLM, fault: str) -> None:
    export(tmp_path / "m", model)
    before = (tmp_path / "m/model.safetensors").read_bytes()
    parameters = dict(model.named_parameters())
    break_it, says = FAULTS[fault]
    break_it(parameters)
    drained = []
    pairs = ((name, drained.append(name) or tensor) for name, tensor in parameters.items())
    with pytest.raises(CheckpointError, match=says):
        export(tmp_path / "m", model, pairs)
    assert len(drained) == len(parameters)  # other ranks gather all of them
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert (tmp_path / "m/model.safetensors").read_bytes() == before


def test_tied_weights_may_come_under_any_of_their_names(tmp_path: Path, model: LlamaForCausalLM) -> None:
    parameters = dict(model.named_parameters())
    embedding = parameters.pop("model.embed_tokens.weight")
    folder = export(tmp_path / "m", model, [("lm_head.weight", embedding), *parameters.items()])
    assert torch.equal(load_file(folder / "model.safetensors")["model.embed_tokens.weight"], embedding)
    both = [("lm_head.weight", embedding), ("model.embed_tokens.weight", embedding), *parameters.items()]
    assert keys_in(export(tmp_path / "n", model, both)) == keys_in(folder)


def test_a_parameter_that_comes_twice(tmp_path: Path, model: LlamaForCausalLM) -> None:
    parameters = list(model.named_parameters())
    with pytest.raises(CheckpointError, match="was given twice"):
        export(tmp_path / "m", model, [*parameters, parameters[-1]])


def test_a_folder_that_transformers_does_not_accept_is_not_published(
    tmp_path: Path, model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "dpo_dist.checkpoint.writer.revert_weight_conversion",
        lambda model, tensors: {name.replace("norm", "nrm"): tensor for name, tensor in tensors.items()},
    )
    with pytest.raises(CheckpointError, match=r"does not load as it should: .*nrm"):
        export(tmp_path / "m", model)
    assert list(tmp_path.iterdir()) == []


def test_weights_may_be_read_by_whom_the_umask_allows(tmp_path: Path, model: LlamaForCausalLM) -> None:
    folder = export(tmp_path / "m", model)
    assert len({path.stat().st_mode & 0o777 for path in folder.iterdir()}) == 1


def test_what_is_written_is_read_back(tmp_path: Path, model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaging(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        tensors[NORM].view(torch.int32)[0] ^= 1  # one bit, in what goes to the file
        save_file(tensors, path, metadata=metadata)
        tensors[NORM].view(torch.int32)[0] ^= 1

    monkeypatch.setattr("dpo_dist.checkpoint.writer.save_file", damaging)
    with pytest.raises(CheckpointError, match=rf"{NORM} reads back differently than it was written"):
        export(tmp_path / "m", model)
    assert list(tmp_path.iterdir()) == []


# ---- the export command


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("run")
    return save_engine(CheckpointStore(run_dir, only_rank()), make_engine(3, torch.float32), run_state(), torch.float32)


def test_out_must_be_unused(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used/mine.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "used", tmp_path / "file", checkpoint / "model"):
        with pytest.raises(ConfigError, match=f"OUT={out}") as caught:
            export_checkpoint(checkpoint, out)
        assert caught.value.exit_code == 2
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "new/folder"):
        assert (export_checkpoint(checkpoint, out) / "model.safetensors").is_file()


def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path) -> None:
    engine = make_engine(0, torch.float32)
    folder = save_engine(CheckpointStore(tmp_path / "run", only_rank()), engine, run_state(), torch.float32)
    path = folder / "shards/mp_rank_00_model_states.pt"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"mp_rank_00_model_states\.pt has \d+ bytes"):
        export_checkpoint(folder, tmp_path / "out")
    with pytest.raises(CheckpointError, match="does not exist"):
        export_checkpoint(tmp_path / "nowhere", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_checkpoint_without_assets(tmp_path: Path) -> None:
    engine = make_engine(0, torch.float32)
    folder = CheckpointStore(tmp_path, only_rank()).save(run_state(), lambda folder: save_shards(engine, folder))
    with pytest.raises(CheckpointError, match=r"model_assets/config\.json is missing"):
        export_checkpoint(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("pattern", "change", "says"),
    [
        ("*optim_states.pt", None, "no complete set of shards"),
        ("*model_states.pt", None, "holds no complete set of shards"),
        ("*optim_states.pt", {"fp32_flat_groups": []}, "without NVMe offload"),
        ("*optim_states.pt", {"partition_count": 2}, "is one of 2 parts, and 1 are there"),
        ("*optim_states.pt", {"fp32_flat_groups": [torch.zeros(100)]}, "the shards hold 100"),
        ("*optim_states.pt", {"fp32_flat_groups": [torch.zeros(10**6)]}, "the shards hold 1000000"),
    ],
)
def test_shards_that_do_not_hold_the_model(
    checkpoint: Path, tmp_path: Path, pattern: str, change: dict[str, Any] | None, says: str
) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    for path in (checkpoint / "shards").iterdir():
        (shards / path.name).write_bytes(path.read_bytes())
    (path,) = shards.glob(pattern)
    if change is None:
        path.unlink()
    else:
        content = torch.load(path, weights_only=False)
        torch.save({"optimizer_state_dict": content["optimizer_state_dict"] | change}, path)
    with pytest.raises(CheckpointError, match=says):
        list(full_parameters(tmp_path, torch.float32))


# ---- two at once


def test_two_exports_into_one_folder(tmp_path: Path, model: LlamaForCausalLM) -> None:
    """The second would clear away what the first is writing."""
    checkpoint, out = saved_model(tmp_path), tmp_path / "exported"
    staging, held = claim_staging(out)
    (staging / "half").write_text("x")
    for attempt in (lambda: export_checkpoint(checkpoint, out), lambda: export(out, model)):
        with pytest.raises(FolderInUseError, match="exported is being written by another process; wait until it has"):
            attempt()
    assert [path.name for path in staging.iterdir()] == ["half"]
    assert held is not None
    os.close(held)  # as when its process is killed
    export_checkpoint(checkpoint, out)
    assert not staging.exists() and not (out / "half").exists()
    with pytest.raises(ConfigError, match="exists and is not an empty folder"):
        export_checkpoint(checkpoint, out)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    checkpoint, out = saved_model(tmp_path), tmp_path / "file" / "exported"
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"exported cannot be made \(.*\); name another folder"):
        export_checkpoint(checkpoint, out)


def test_an_export_that_another_has_overtaken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, out = saved_model(tmp_path), tmp_path / "exported"
    real = exporting.verify

    def slow(folder: Path) -> None:
        real(folder)
        out.mkdir()
        (out / "config.json").write_text("the other's")

    monkeypatch.setattr(exporting, "verify", slow)
    with pytest.raises(ConfigError, match="exists and is not an empty folder"):
        export_checkpoint(checkpoint, out)
    assert [path.name for path in out.iterdir()] == ["config.json"]
    assert not (tmp_path / ".tmp-exported").exists()


def test_a_link_in_the_place_of_what_is_being_written_is_not_followed(tmp_path: Path, model: LlamaForCausalLM) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious").write_text("x")
    (tmp_path / ".tmp-exported").symlink_to(other)
    export(tmp_path / "exported", model)
    assert (other / "precious").read_text() == "x"


def saved_model(folder: Path) -> Path:
    engine = make_engine(0, torch.float32)
    return save_engine(CheckpointStore(folder, only_rank()), engine, run_state(), torch.float32)
