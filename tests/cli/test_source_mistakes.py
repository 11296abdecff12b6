"""What a user gets wrong about the reference and adapters: exit code 2 with the reason, in every command."""

import json
import shutil
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from dpo_dist.cli import app
from tests.cli.test_mistakes import GOLDEN, config, refuse
from tests.launching import launch, succeeded

__all__ = ["config"]

COMMANDS = ("train", "check")
OTHER = f"model.reference_name_or_path={GOLDEN / 'tiny_reference'}"


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of tiny_policy's log-probabilities, made by the command."""
    folder = tmp_path_factory.mktemp("stored")
    row = {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9, 2], "rejected_ids": [10, 2]}
    (folder / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    settings = [
        f"model.model_name_or_path={GOLDEN / 'tiny_policy'}",
        "model.dtype=float32",
        "data.train=[{path: pairs.jsonl}]",
        "train.output_dir=out",
        "parallel.deepspeed=zero0_cpu",
        "reference.cache_dir=cache",
    ]
    (folder / "run.yaml").write_text("{}\n")
    environment = {"DPO_DIST_CACHE": str(folder / "own")}
    done = launch(1, "dpo_dist", "precompute", "run.yaml", *settings, cwd=folder, env=environment)
    succeeded(done)
    assert "2 values" in done.stderr
    assert not (folder / "out").exists()
    return folder / "cache"


@pytest.mark.parametrize("command", [*COMMANDS, "precompute"])
def test_cache_of_another_model(config: Path, stored: Path, command: str) -> None:
    message = refuse(config, f"reference.cache_dir={stored}", OTHER, command=command)
    assert f"reference.cache_dir={stored} holds log-probabilities of another reference: weights=" in message
    assert "dtype" not in message
    assert ", made from " in message and "give another folder" in message


@pytest.mark.parametrize("command", COMMANDS)
def test_cache_of_another_dtype(config: Path, stored: Path, command: str) -> None:
    message = refuse(config, f"reference.cache_dir={stored}", "reference.dtype=bfloat16", command=command)
    assert "another reference: dtype=float32 (this run: bfloat16); give another folder" in message


@pytest.mark.parametrize("command", COMMANDS)
def test_folder_that_is_no_cache(config: Path, command: str) -> None:
    message = refuse(config, "reference.cache_dir=.", command=command)
    assert "no reference.json, so it is not a cache" in message


def test_damaged_identity(config: Path, stored: Path) -> None:
    shutil.copytree(stored, config / "damaged")
    (config / "damaged" / "reference.json").write_text("{")
    assert "reference.json is damaged; delete the folder" in refuse(config, "reference.cache_dir=damaged")


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        (
            "loss.loss_type=sft",
            "loss.loss_type=sft reads no reference: there is nothing to compute; set reference.source",
        ),
        ("loss.loss_type=kto", "loss.loss_type=kto needs the reference's values of completions after other prompts"),
        ("loss.ld_alpha=0.5", "loss.ld_alpha=0.5 needs the reference's value of every token, and a cache gives sums"),
    ],
)
def test_a_loss_that_no_cache_serves(config: Path, setting: str, reason: str) -> None:
    assert reason in refuse(config, setting, command="precompute")


def test_nothing_to_precompute(config: Path) -> None:
    message = refuse(config, "reference.source=none", command="precompute")
    assert "reference.source=none: there is nothing to compute" in message


@pytest.mark.parametrize(
    ("overrides", "fragments"),
    [
        (["reference.source=adapter_off"], ["no adapters to switch off", "adapter.peft_type"]),
        (["adapter.peft_type=adalora", "train.max_steps=null"], ["number of updates", "train.max_steps"]),
        (["reference.offload_param=true"], ["reference.offload_param=true", "ZeRO stage 3"]),
        (
            ["reference.zero_hpz_partition_size=2", "parallel.deepspeed=zero3_cpu"],
            ["reference.zero_hpz_partition_size=2", "does not divide the 1 processes"],
        ),
        (["reference.dtype=float16"], ["reference.dtype=float16", "needs a GPU"]),
        (["adapter.peft_type=lora", "adapter.lora_target_modules=[q_porj]"], ["q_porj", "q_proj"]),
        (
            ["adapter.peft_type=lora", "adapter.lora_target_modules=[lm_head]"],
            ["lm_head", "adapter.lora_target_modules"],
        ),
        (["adapter.peft_type=lora", "adapter.lora_modules_to_save=[hed]"], ["adapter.lora_modules_to_save", "hed"]),
        (["adapter.adapter_name_or_path=gone"], ["adapter.adapter_name_or_path=", "gone does not exist"]),
    ],
)
@pytest.mark.parametrize("command", COMMANDS)
def test_settings(config: Path, command: str, overrides: list[str], fragments: list[str]) -> None:
    message = refuse(config, *overrides, command=command)
    for fragment in fragments:
        assert fragment in message


# ---- adapters on disk


@pytest.fixture
def adapter(config: Path) -> Path:
    """An adapter of a model that is half as wide as tiny_policy."""
    values = AutoConfig.from_pretrained(GOLDEN / "tiny_policy")
    values.hidden_size //= 2
    values.head_dim = values.hidden_size // values.num_attention_heads
    model = AutoModelForCausalLM.from_config(values)
    get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained("adapter")
    return config / "adapter"


@pytest.mark.parametrize("command", COMMANDS)
def test_adapter_of_another_base(config: Path, adapter: Path, command: str) -> None:
    message = refuse(config, "adapter.adapter_name_or_path=adapter", command=command)
    assert f"adapter.adapter_name_or_path={adapter}" in message
    assert "shape" in message


def test_adapter_that_is_cut_short(config: Path, adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    message = refuse(config, "adapter.adapter_name_or_path=adapter", command="check")
    assert "adapter_model.safetensors" in message


# ---- export


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["adapter", "out"], "is an exported adapter already; --merged"),
        (["adapter", "out", "--base", "x"], "--base has no effect without --merged"),
        ([str(GOLDEN / "tiny_policy"), "out", "--merged"], "holds no adapter"),
        (["adapter", ".", "--merged"], "is not an empty folder"),
        (["adapter", "out", "--merged", "--base", "./gone"], "--base=./gone does not exist"),
        (["adapter", "out", "--merged", "--base", str(GOLDEN / "tiny_policy")], "cannot be merged into"),
    ],
)
def test_export(config: Path, adapter: Path, arguments: list[str], fragment: str) -> None:
    result = CliRunner().invoke(app, ["export", *arguments])
    assert result.exit_code == 2, result.output
    assert result.output.count("error:") == 1 and "Traceback" not in result.output
    assert fragment in result.output.replace("\n", " ")
    assert not (config / "out").exists()
