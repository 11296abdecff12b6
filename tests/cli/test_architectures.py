"""What `check` and `train` say of a model's architecture before any weight is read."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from typer.testing import CliRunner

from dpo_dist.cli import app

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A command on a model of an architecture, with rows of some length."""

    def command(name: str, model_type: str, length: int = 6, **settings: Any) -> Any:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**TINY | settings)).save_pretrained(
            tmp_path / "model"
        )
        rows = [{"prompt_ids": [n + 3] * 3, "chosen_ids": [5] * (length - 3), "rejected_ids": [7, n]} for n in range(4)]
        (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "run.yaml").write_text(
            "model: {model_name_or_path: model, dtype: float32}\n"
            "data: {train: [{path: pairs.jsonl}]}\n"
            "train: {output_dir: out, examples_per_step: 2, max_steps: 1}\n"
            "parallel: {deepspeed: zero0_cpu}\n"
        )
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("DPO_DIST_CACHE", str(tmp_path / "cache"))
        return CliRunner().invoke(app, [name, "run.yaml"])

    return command


@pytest.mark.parametrize("command", ["check", "train"])
@pytest.mark.parametrize(
    ("model_type", "settings", "reason"),
    [
        ("roberta", {"is_decoder": True}, "differ"),
        ("bert", {"is_decoder": True}, "differ"),
        ("gptj", {"rotary_dim": 4}, "its own code"),
        ("gpt_neo", {"attention_types": [[["global"], 2]]}, "its own code"),
        ("falcon", {}, "its own code"),
    ],
)
def test_an_architecture_that_computes_more_is_refused(
    run: Any, command: str, model_type: str, settings: dict[str, Any], reason: str
) -> None:
    result = run(command, model_type, **settings)
    assert result.exit_code == 2, result.output
    assert f"model.model_name_or_path: architecture {model_type} cannot be trained here: " in result.output
    assert reason in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("command", ["check", "train"])
def test_a_row_longer_than_the_table_of_positions(run: Any, command: str) -> None:
    result = run(command, "gpt2", length=18, n_positions=16)
    assert result.exit_code == 2, result.output
    assert "pairs.jsonl:1: this row of data.train needs 17 positions, and architecture gpt2" in result.output
    assert "has 16; set data.max_length=16 with data.truncation_mode" in result.output


def test_a_row_that_just_fits_is_trained(run: Any) -> None:
    result = run("train", "gpt2", length=17, n_positions=16)
    assert result.exit_code == 0, result.output


def test_a_rotary_model_reads_on_with_a_remark(run: Any) -> None:
    result = run("check", "llama", length=18, max_position_embeddings=16)
    assert result.exit_code == 0, result.output
    assert "data.train: the longest row has 18 tokens" in result.output
    assert "was made for 16 (max_position_embeddings)" in result.output


def test_the_auxiliary_loss_of_a_router_is_said_to_be_left_out(run: Any) -> None:
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "num_key_value_heads": 2}
    result = run("train", "mixtral", output_router_logits=True, **experts)
    assert result.exit_code == 0, result.output
    assert "asks for the auxiliary loss of its router (output_router_logits=true)" in result.output


def test_a_reference_that_was_changed_is_another_run(run: Any, tmp_path: Path) -> None:
    """40 rows of its head set to zero between run and resume were once accepted."""
    reference = tmp_path / "reference"
    overrides = [f"model.reference_name_or_path={reference}", "checkpoint.resume=auto"]
    assert run("check", "llama").exit_code == 0
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"](**TINY))
    model.save_pretrained(reference)
    result = CliRunner().invoke(app, ["train", "run.yaml", *overrides])
    assert result.exit_code == 0, result.output
    with torch.no_grad():
        model.lm_head.weight[:40] = 0
    model.save_pretrained(reference)
    result = CliRunner().invoke(app, ["train", "run.yaml", "train.max_steps=2", *overrides])
    assert result.exit_code == 2, result.output
    assert "belongs to another run: the reference=" in result.output


def test_train_names_every_note_with_its_share_of_rows(run: Any) -> None:
    assert run("check", "llama", length=12).exit_code == 0
    cut = ["data.max_length=8", "data.truncation_mode=keep_start"]
    for command in ("train", "check"):
        result = CliRunner().invoke(app, [command, "run.yaml", *cut])
        assert result.exit_code == 0, result.output
        assert "4 of 4 rows (100 %): truncated: completions were cut at data.max_length" in result.output


def rewritten(folder: Path, change: Any) -> None:
    """Tensors and configuration of a model, changed."""
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def _tie(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    config["tie_word_embeddings"] = True


def _quantise(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}


def _as_integers(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    tensors["lm_head.weight"] = (100 * tensors["lm_head.weight"]).to(torch.int8)


def _unknown_activation(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    config["hidden_act"] = "nope"


def _text_as_number(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    config["rms_norm_eps"] = "small"


@pytest.mark.parametrize("command", ["check", "train"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_tie, "its config.json ties lm_head.weight to the embeddings, and its files hold other values for it"),
        (_quantise, "its weights are quantised (gptq), and only float32, bfloat16 and float16 can be trained"),
        (_as_integers, "lm_head.weight is stored as I8, and only float32"),
        (_unknown_activation, "no model can be built from its config.json (KeyError: 'nope')"),
        (_text_as_number, "its config.json cannot be used: "),
    ],
)
def test_a_model_that_cannot_be_trained_as_it_stands(
    run: Any, tmp_path: Path, command: str, change: Any, said: str
) -> None:
    assert run("check", "llama").exit_code == 0
    rewritten(tmp_path / "model", change)
    result = CliRunner().invoke(app, [command, "run.yaml"])
    assert result.exit_code == 2, result.output
    assert said in result.output and "Traceback" not in result.output


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt_oss", "mixtral", "gpt2"])
def test_honest_runs_in_bfloat16_pass_the_self_check(run: Any, model_type: str) -> None:
    """Large weights, so that attention is sharp and its rounding shows."""
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1} if model_type in ("gpt_oss", "mixtral") else {}
    heads = {} if model_type == "gpt2" else {"num_key_value_heads": 2, "head_dim": 8}
    assert run("check", model_type, length=40, initializer_range=0.25, **experts, **heads).exit_code == 0
    result = CliRunner().invoke(app, ["train", "run.yaml", "model.dtype=bfloat16"])
    assert result.exit_code == 0, result.output
    assert "the architecture's own forward differs by" in result.output
