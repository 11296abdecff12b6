"""What a user gets wrong ends in exit code 2, one message with path, value and way out, no traceback, nothing written.

Most cases run the real command in this process; those that are about processes are launched.
"""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from dpo_dist.attention import packages
from dpo_dist.cli import app
from dpo_dist.metrics import TRACKER_PACKAGES
from tests.launching import REPOSITORY, launch
from tests.liger_package import hide_liger, install_liger
from tests.machine import Machine

GOLDEN = REPOSITORY / "tests" / "golden"
PAIR = {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9, 2], "rejected_ids": [10, 2]}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration that would train, in an empty folder that is the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DPO_DIST_CACHE", str(tmp_path / "cache"))
    (tmp_path / "pairs.jsonl").write_text(json.dumps(PAIR) + "\n" + json.dumps({**PAIR, "prompt_ids": [11, 12]}) + "\n")
    values = {
        "model": {"model_name_or_path": str(GOLDEN / "tiny_policy"), "dtype": "float32"},
        "data": {"train": [{"path": "pairs.jsonl"}]},
        "train": {"output_dir": "out", "examples_per_step": 2, "max_steps": 2},
        "parallel": {"deepspeed": "zero0_cpu"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


def refuse(folder: Path, *overrides: str, command: str = "train") -> str:
    """Run the command, which must fail as a user's mistake; returns its message."""
    before = snapshot(folder)
    result = CliRunner().invoke(app, [command, "run.yaml", *overrides])
    assert result.exit_code == 2, f"exit {result.exit_code}: {result.output}\n{result.exception!r}"
    assert "Traceback" not in result.output
    assert result.output.count("error:") == 1
    after = snapshot(folder)
    assert {path for path in after if not path.startswith("cache")} == before, "something was written"
    return result.output


def snapshot(folder: Path) -> set[str]:
    cache = str(folder / "cache")
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not str(path).startswith(cache)}


# ---- the configuration


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("loss.bta=0.1", ["loss.bta", "loss.beta"]),
        ("loss.beta=high", ["loss.beta", "high"]),
        ("loss.beta=", ["loss.beta= is empty", "loss.beta=null"]),
        ("data.train.path=pairs.jsonl", ["data.train.0.path=pairs.jsonl"]),
        ("loss.loss_type=sigmoyd", ["loss.loss_type", "sigmoyd", "sigmoid"]),
        ("train.num_train_epochs=2", ["train.num_train_epochs", "train.max_steps"]),
        ("train.warmup_ratio=0.1", ["warmup_ratio", "warmup_steps"]),
        ("data.truncation_mode=drop", ["data.truncation_mode", "data.max_length"]),
        ("parallel.deepspeed=zero4", ["parallel.deepspeed", "zero4", "zero3"]),
    ],
)
def test_configuration(config: Path, override: str, fragments: list[str]) -> None:
    message = refuse(config, override)
    for fragment in fragments:
        assert fragment in message


def test_all_configuration_errors_at_once(config: Path) -> None:
    message = refuse(config, "loss.bta=0.1", "train.examples_per_step=0", "packing.max_token=5")
    for fragment in ("loss.bta", "train.examples_per_step", "packing.max_token"):
        assert fragment in message


def test_configuration_errors_come_in_under_two_seconds(config: Path) -> None:
    launch(1, "dpo_dist", "train", "run.yaml", "loss.bta=0.1", cwd=config)  # file caches are warm after this
    fastest = min(_seconds_to_refuse(config) for _ in range(3))
    assert fastest < 2.0


def _seconds_to_refuse(config: Path) -> float:
    started = time.perf_counter()
    done = launch(1, "dpo_dist", "train", "run.yaml", "loss.bta=0.1", cwd=config)
    assert done.returncode == 2
    assert "loss.bta" in done.stderr
    return time.perf_counter() - started


def test_deepspeed_file_that_sets_what_is_ours(config: Path) -> None:
    (config / "mine.json").write_text(json.dumps({"zero_optimization": {"stage": 2}, "gradient_clipping": 1.0}))
    message = refuse(config, "parallel.deepspeed=mine.json")
    assert "gradient_clipping" in message
    assert "train.max_grad_norm" in message


def test_float16_on_cpu(config: Path) -> None:
    for command in ("train", "check"):
        message = refuse(config, "model.dtype=float16", command=command)
        assert "model.dtype=float16" in message
        assert "bfloat16" in message


def test_kernel_that_needs_a_gpu(config: Path) -> None:
    message = refuse(config, "model.attn_implementation=torch", "model.dtype=bfloat16")
    assert "model.attn_implementation=torch" in message
    assert "CUDA" in message


TINY = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 512,
}  # fmt: skip
COMPILED = "error: model.torch_compile=true "


@pytest.mark.parametrize("command", ["check", "train"])
@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (("adapter.peft_type=lora", "parallel.deepspeed=zero3_cpu"), "does not go with adapters under ZeRO-3, where"),
        (("adapter.peft_type=prefix_tuning",), "does not go with virtual tokens (prefix_tuning, prompt_tuning"),
        (("adapter.peft_type=lora", "adapter.load_in_4bit=true"), "does not go with adapter.load_in_4bit=true, whose"),
    ],
)
def test_what_cannot_be_compiled(config: Path, overrides: tuple[str, ...], reason: str, command: str) -> None:
    message = refuse(config, "model.torch_compile=true", *overrides, command=command)
    assert COMPILED + reason in message
    assert "leave" in message


def test_no_compiler(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    message = refuse(config, "model.torch_compile=true", command="check")
    assert COMPILED + "needs a C++ compiler on a CPU, and no-such-compiler is not found" in message


GEMMA = {**TINY, "model_type": "gemma2", "head_dim": 256, "sliding_window": 4}
QWEN_MOE = {**TINY, "model_type": "qwen2_moe", "use_sliding_window": True, "sliding_window": 4}


@pytest.mark.parametrize("command", ["check", "train"])
@pytest.mark.parametrize(
    ("kernel", "capability", "installed", "model", "reason"),
    [
        ("flash_attn", None, [], {}, "needs a CUDA device, and this run is on cpu"),
        ("torch", "7.5", [], {}, "needs a device of compute capability 8.0 or higher, and this one has 7.5"),
        ("flash_attn", "8.0", [], {}, "needs the package flash-attn, flash-attn-3 or flash-attn-4, and none is"),
        ("flash_attn", "8.0", ["FLASH_4"], {}, "flash-attn 4 is not made for compute capability 8.0"),
        ("flash_attn", "9.0", ["FLASH_2", "FLASH_4"], {}, "both are installed, and each overwrites files of the other"),
        ("flash_attn", "8.0", ["FLASH_2"], {**TINY, "head_dim": 12}, "has no kernel for heads of dimension 12"),
        ("torch", "8.0", [], {**TINY, "head_dim": 264}, "has no kernel for heads of dimension 264 (multiples of 8 up"),
        ("flash_attn", "9.0", ["FLASH_3"], {**TINY, "head_dim": 256}, "has no deterministic backward kernel for heads"),
        ("flash_attn", "10.0", ["FLASH_4"], GEMMA, "has no backward kernel with window and softcap for heads of"),
        ("torch", "9.0", [], GEMMA, "has no softcap, which the model's architecture needs"),
        ("sdpa", None, [], QWEN_MOE, "its sliding window of 4 tokens is not passed to the kernel"),
    ],
)
def test_kernel_that_cannot_run(
    config: Path,
    machine: Machine,
    kernel: str,
    capability: str | None,
    installed,
    model: dict,
    reason: str,
    command: str,
) -> None:
    overrides = [f"model.attn_implementation={kernel}"]
    if capability is not None:
        machine.has(capability, *(getattr(packages, name) for name in installed))
        machine.monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        overrides.append("parallel.deepspeed=zero3_bf16")
    if model:
        (config / "model").mkdir()
        (config / "model" / "config.json").write_text(json.dumps({"model_type": "llama", **model}))
        weights = (GOLDEN / "tiny_policy" / "model.safetensors").read_bytes()
        (config / "model" / "model.safetensors").write_bytes(weights)
        overrides.append("model.model_name_or_path=model")
    message = refuse(config, "model.dtype=bfloat16", *overrides, command=command)
    assert reason in message
    if kernel == "sdpa":
        assert "model.model_name_or_path: architecture qwen2_moe cannot be packed" in message
        assert "only models of this architecture without a sliding window can be" in message
    else:
        assert f"error: model.attn_implementation={kernel} " in message
        assert message.rstrip().endswith("; use auto, which picks the best kernel that works")


@pytest.mark.parametrize("command", ["check", "train"])
@pytest.mark.parametrize(
    ("has_gpu", "is_installed", "model_type", "reason"),
    [
        (False, True, "llama", "needs a GPU with Triton, and this run is on cpu"),
        (True, False, "llama", "needs the package liger-kernel; install it by pip install 'dpo-dist[liger]'"),
        (True, True, "arcee", "liger-kernel has no kernels for architecture arcee"),
    ],
)
def test_liger_that_cannot_run(
    config: Path, machine: Machine, has_gpu: bool, is_installed: bool, model_type: str, reason: str, command: str
) -> None:
    if has_gpu:
        machine.monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    if is_installed:
        install_liger(config / "cache", machine.monkeypatch)
    else:
        hide_liger(machine.monkeypatch)
    (config / "model").mkdir()
    (config / "model" / "config.json").write_text(json.dumps({**TINY, "model_type": model_type}))
    shutil.copy(GOLDEN / "tiny_policy" / "model.safetensors", config / "model")
    message = refuse(config, "model.use_liger_kernel=true", "model.model_name_or_path=model", command=command)
    assert "error: model.use_liger_kernel=true" in message
    assert reason in message
    assert message.rstrip().endswith("leave it out: the result is the same within rounding")


def test_output_folder_in_use(config: Path) -> None:
    (config / "out").mkdir()
    (config / "out" / "thesis.tex").write_text("years of work")
    assert "train.output_dir=out is not empty" in refuse(config)
    assert "holds no run" in refuse(config, "checkpoint.resume=auto")


@pytest.mark.parametrize("command", ["train", "check"])
@pytest.mark.parametrize("folder", ["run.yaml/out", "/proc/out"])
def test_output_folder_that_cannot_be_made(config: Path, folder: str, command: str) -> None:
    assert f"train.output_dir={folder} cannot be made" in refuse(config, f"train.output_dir={folder}", command=command)


@pytest.mark.parametrize("command", ["check", "train"])
@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_tracker_without_its_package(config: Path, monkeypatch: pytest.MonkeyPatch, tracker: str, command: str) -> None:
    monkeypatch.setitem(TRACKER_PACKAGES, tracker, "no_such_package")
    message = refuse(config, f"log.report_to=[{tracker}]", command=command)
    assert f"log.report_to={tracker} needs the package no_such_package; pip install no_such_package" in message


# ---- the model


def test_model_that_is_not_there(config: Path) -> None:
    message = refuse(config, "model.model_name_or_path=./nowhere")
    assert "model.model_name_or_path=./nowhere does not exist; give the folder" in message


def test_model_folder_without_weights(config: Path) -> None:
    (config / "empty").mkdir()
    (config / "empty" / "config.json").write_bytes((GOLDEN / "tiny_policy" / "config.json").read_bytes())
    message = refuse(config, "model.model_name_or_path=empty")
    assert "no weights" in message
    assert "safetensors" in message


def test_reference_with_another_vocabulary(config: Path) -> None:
    values = json.loads((GOLDEN / "tiny_policy" / "config.json").read_text())
    (config / "other").mkdir()
    (config / "other" / "config.json").write_text(json.dumps({**values, "vocab_size": 64}))
    (config / "other" / "model.safetensors").write_bytes((GOLDEN / "tiny_policy" / "model.safetensors").read_bytes())
    message = refuse(config, "model.reference_name_or_path=other")
    # Its weights do not fit its configuration either; that is not what is to be said.
    assert (
        f"model.reference_name_or_path={config / 'other'} has a vocabulary of 64 tokens, the policy one of 128"
        in message
    )


def test_text_without_a_tokenizer(config: Path) -> None:
    (config / "pairs.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    message = refuse(config)
    assert "tokenizer" in message


# ---- the data


@pytest.mark.parametrize(
    ("second_line", "fragments"),
    [
        ('{"prompt_ids": [5', ["pairs.jsonl:2"]),
        (json.dumps({"prompt_ids": [5], "chosen_ids": [6]}), ["pairs.jsonl:2", "rejected_ids"]),
        (json.dumps({**PAIR, "chosen_ids": "abc"}), ["pairs.jsonl:2", "chosen_ids"]),
        (json.dumps({**PAIR, "rejected_ids": PAIR["chosen_ids"]}), ["pairs.jsonl:2", "data.on_bad_row"]),
        (json.dumps({**PAIR, "rejected_ids": []}), ["pairs.jsonl:2", "data.on_bad_row"]),
        (json.dumps({**PAIR, "prompt_ids": [5, 500]}), ["pairs.jsonl:2", "500", "vocabulary"]),
    ],
)
def test_data_row(config: Path, second_line: str, fragments: list[str]) -> None:
    (config / "pairs.jsonl").write_text(json.dumps(PAIR) + "\n" + second_line + "\n")
    message = refuse(config)
    for fragment in fragments:
        assert fragment in message


def test_data_file_that_is_not_there(config: Path) -> None:
    message = refuse(config, "data.train.0.path=./nowhere.jsonl")
    assert "data.train.0" in message
    assert "nowhere.jsonl" in message


def test_no_usable_row_is_an_error_even_when_skipping(config: Path) -> None:
    (config / "pairs.jsonl").write_text(2 * (json.dumps({**PAIR, "rejected_ids": PAIR["chosen_ids"]}) + "\n"))
    message = refuse(config, "data.on_bad_row=skip")
    assert "pairs.jsonl" in message
    assert "2" in message


def test_example_larger_than_the_budget(config: Path) -> None:
    message = refuse(config, "packing.max_tokens=5")
    assert "packing.max_tokens=5" in message
    assert "pairs.jsonl:1" in message
    assert "6 packed tokens" in message


def test_over_long_row(config: Path) -> None:
    message = refuse(config, "data.max_length=4")
    assert "pairs.jsonl:1" in message
    assert "data.max_length" in message


# ---- models


@pytest.mark.parametrize("command", ["check", "train"])
@pytest.mark.parametrize(
    ("fault", "fragments"),
    [
        ("cut", ["model.safetensors", "copy it again"]),
        ("sizes", ["model.model_name_or_path=", "vocab", "other shapes", "expected"]),
        ("layers", ["model.model_name_or_path=", "lacks", "such as model.layers."]),
    ],
)
def test_model_that_does_not_fit_its_configuration(
    config: Path, command: str, fault: str, fragments: list[str]
) -> None:
    folder = shutil.copytree(GOLDEN / "tiny_policy", config / "vocab")
    settings, weights = folder / "config.json", folder / "model.safetensors"
    values = json.loads(settings.read_text())
    if fault == "cut":
        weights.write_bytes(weights.read_bytes()[:-9])
    elif fault == "sizes":
        settings.write_text(json.dumps({**values, "intermediate_size": values["intermediate_size"] + 8}))
    else:
        settings.write_text(json.dumps({**values, "num_hidden_layers": values["num_hidden_layers"] + 1}))
    message = refuse(config, f"model.model_name_or_path={folder}", command=command)
    for fragment in fragments:
        assert fragment in message


# ---- checkpoints, and two ranks


def test_checkpoint_that_is_not_one(config: Path) -> None:
    (config / "step-000001").mkdir()
    message = refuse(config, "checkpoint.resume=step-000001")
    assert "checkpoint.resume=" in message
    assert "step-000001 has no manifest.json" in message


def test_checkpoint_is_judged_before_anything_is_built(config: Path) -> None:
    assert CliRunner().invoke(app, ["train", "run.yaml"]).exit_code == 0
    resume = "checkpoint.resume=auto"
    for override, fragment in {
        "train.seed=7": "train.seed=42 (this run: 7)",
        "train.shuffle=false": "train.shuffle=True (this run: False)",
        "train.examples_per_step=1": "train.examples_per_step",
        "data.train.0.limit=1": "the training data=",
        f"model.reference_name_or_path={GOLDEN / 'tiny_reference'}": "the reference=",
    }.items():
        for command in ("check", "train"):
            message = refuse(config, resume, override, command=command)
            assert "belongs to another run" in message and fragment in message
    for ranks, stage, anew in (("2", 0, ""), ("1", 3, "weights and optimizer are shared out anew; ")):
        file = f"parallel.deepspeed=zero{stage}_cpu"
        result = CliRunner().invoke(app, ["check", "run.yaml", resume, "--ranks", ranks, file])
        number = "2 processes" if ranks == "2" else "1 process"
        told = (
            f"was saved by 1 process at ZeRO stage 0 and goes on with {number} at ZeRO stage {stage}: {anew}steps keep"
        )
        assert result.exit_code == 0 and told in result.output
    result = CliRunner().invoke(app, ["check", "run.yaml", resume])
    assert result.exit_code == 0 and "goes on with" not in result.output
    nvme = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}}
    Path("nvme.json").write_text(json.dumps(nvme))
    says = "what parallel.deepspeed of this run keeps on NVMe cannot be shared out anew; go on with a file that keeps"
    assert says in refuse(config, resume, "parallel.deepspeed=nvme.json")


@pytest.mark.parametrize("named", ["out", "out/checkpoints", "out/checkpoints/latest"])
def test_checkpoint_named_by_the_folder_it_is_in(config: Path, named: str) -> None:
    assert CliRunner().invoke(app, ["train", "run.yaml"]).exit_code == 0
    meant = "did you mean {}out/checkpoints/step-000002?"
    assert meant.format(f"{config}/") in refuse(config, "train.output_dir=new", f"checkpoint.resume={named}")
    result = CliRunner().invoke(app, ["export", named, "exported"])
    assert result.exit_code == 2 and meant.format("") in result.output


def test_export_of_a_model_folder(config: Path) -> None:
    result = CliRunner().invoke(app, ["export", str(GOLDEN / "tiny_policy"), "exported"])
    assert result.exit_code == 2 and "is a model folder already" in result.output


def test_export_of_something_else(config: Path) -> None:
    (config / "step-000001").mkdir()
    result = CliRunner().invoke(app, ["export", "step-000001", "exported"])
    assert result.exit_code == 2
    assert "step-000001" in result.output
    assert not (config / "exported").exists()


@pytest.mark.parametrize(
    ("override", "fragment"),
    [
        ("data.train.0.path=./nowhere.jsonl", "nowhere.jsonl"),  # found by every rank on its own
        ("checkpoint.resume=.", "has no manifest.json"),  # found by all ranks together
    ],
)
def test_two_ranks_say_it_once_and_end(config: Path, override: str, fragment: str) -> None:
    done = launch(2, "dpo_dist", "train", "run.yaml", override, cwd=config, timeout=240)
    assert done.returncode != 0
    ours, its_report = done.stderr.split("FAILED", 1)  # torchrun always exits with 1 itself, and says why last
    assert "exitcode  : 2" in its_report
    assert ours.count("error:") == its_report.count("error:") == 1
    assert fragment in ours and fragment in its_report
    assert f"{REPOSITORY}/dpo_dist/" not in done.stderr  # no frame of ours in any traceback
    assert not (config / "out").exists()
