"""The commands a user types, on tiny models: train, check, export, schema; and what is shown while training."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from dpo_dist import __version__
from dpo_dist.cli import app
from dpo_dist.cli.progress import as_text, reporting
from dpo_dist.config import LOSS_TYPES
from dpo_dist.metrics import WALL_CLOCK
from tests.cores import alone
from tests.launching import REPOSITORY, launch, succeeded

GOLDEN = REPOSITORY / "tests" / "golden"
LINE = {
    "step": 3,
    "loss": 0.5,
    "rewards/margins": 0.25,
    "rewards/accuracies": 1.0,
    "tokens_per_second": 100.0,
}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one process: two steps, an evaluation at the start and at the end."""
    folder = tmp_path_factory.mktemp("commands")
    values = {
        "model": {"model_name_or_path": str(GOLDEN / "tiny_policy"), "dtype": "float32"},
        "data": {
            "train": [{"path": str(GOLDEN / "pairs.jsonl"), "limit": 9}],
            "evaluation": [{"path": str(GOLDEN / "pairs.jsonl"), "limit": 5}],
        },
        "train": {"output_dir": str(folder / "out"), "examples_per_step": 5, "learning_rate": 1e-3},
        "evaluation": {"eval_steps": 2, "eval_on_start": True},
        "parallel": {"deepspeed": "zero3_cpu"},
        "reference": {"source": "live"},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    result = CliRunner().invoke(app, ["train", str(folder / "run.yaml")])
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return folder


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_the_docs_say(run_folder: Path) -> None:
    out = run_folder / "out"
    assert {path.name for path in out.iterdir()} == {
        "config.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "model",
    }  # fmt: skip
    assert (out / "checkpoints" / "latest").read_text().strip() == "step-000002"
    assert any((out / "tensorboard").iterdir())
    kinds = [(line["step"], line.get("split")) for line in lines_of(out)]
    assert kinds == [(0, "self_check"), (0, "evaluation"), (1, None), (2, None), (2, "evaluation")]


def test_evaluation_lines(run_folder: Path) -> None:
    before, after = (line for line in lines_of(run_folder / "out") if line.get("split") == "evaluation")
    assert before["dataset"] == "pairs.jsonl" or before["dataset"].startswith("pairs")
    assert before["num_pairs"] == after["num_pairs"] == 5
    # Policy and reference are the same weights before training; training moves them apart.
    assert before["rewards/margins"] == 0.0
    assert after["rewards/margins"] != 0.0
    assert before["rewards/accuracies"] == 0.0  # a tie is not a win


def test_exported_checkpoint_is_the_model_of_the_run(run_folder: Path) -> None:
    checkpoint, exported = run_folder / "out" / "checkpoints" / "step-000002", run_folder / "exported"
    result = CliRunner().invoke(app, ["export", str(checkpoint), str(exported)])
    assert result.exit_code == 0, result.output
    ids = torch.tensor([[5, 9, 100, 3]])
    logits = [
        AutoModelForCausalLM.from_pretrained(folder)(ids).logits for folder in (run_folder / "out" / "model", exported)
    ]
    start = AutoModelForCausalLM.from_pretrained(GOLDEN / "tiny_policy")(ids).logits
    assert torch.equal(*logits)
    assert not torch.equal(logits[0], start)
    assert "dpo_dist" not in (exported / "config.json").read_text()


def test_resolved_configuration_reproduces_the_run(run_folder: Path) -> None:
    again = run_folder / "again"
    arguments = ["train", str(run_folder / "out" / "config.yaml"), f"train.output_dir={again}"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    first, second = (
        [{key: value for key, value in line.items() if key not in WALL_CLOCK} for line in lines_of(folder)]
        for folder in (run_folder / "out", again)
    )
    assert first == second


def test_resuming_a_finished_run_changes_nothing_and_says_so(run_folder: Path) -> None:
    out = run_folder / "out"
    arguments = [str(run_folder / "run.yaml"), "checkpoint.resume=auto"]
    before = {path: path.stat().st_mtime_ns for path in sorted(out.rglob("*"))}
    for command in ("train", "check"):
        result = CliRunner().invoke(app, [command, *arguments])
        assert result.exit_code == 0, result.output
        assert f"2 of 2 steps are done in {out / 'checkpoints' / 'step-000002'}" in result.output
        assert "nothing is left to do" in result.output
        assert {path: path.stat().st_mtime_ns for path in sorted(out.rglob("*"))} == before


def test_settings_changed_since_the_checkpoint_are_listed(run_folder: Path) -> None:
    arguments = [str(run_folder / "run.yaml"), "checkpoint.resume=auto"]
    for command in ("train", "check"):
        assert "changed since" not in CliRunner().invoke(app, [command, *arguments]).output
        result = CliRunner().invoke(app, [command, *arguments, "train.learning_rate=0.125"])
        assert result.exit_code == 0, result.output
        assert re.search(r"changed since the checkpoint: train.learning_rate: \S+ -> 0.125", result.output)


def test_a_finished_run_that_was_killed_before_its_model_writes_it(run_folder: Path) -> None:
    out = run_folder / "out"
    lines, weights = lines_of(out), (out / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(out / "model")
    result = CliRunner().invoke(app, ["train", str(run_folder / "run.yaml"), "checkpoint.resume=auto"])
    assert result.exit_code == 0, result.output
    assert (out / "model" / "model.safetensors").read_bytes() == weights
    assert lines_of(out) == lines


def test_a_model_older_than_the_last_checkpoint_is_written_anew(run_folder: Path) -> None:
    """What is left of an earlier end, when a run that was given more steps is killed before it writes its model."""
    model = run_folder / "out" / "model"
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(b"of an earlier end")
    os.utime(model / "config.json", (0, 0))
    arguments = ["train", str(run_folder / "run.yaml"), "checkpoint.resume=auto"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "nothing is left to do" not in result.output
    assert (model / "model.safetensors").read_bytes() == weights
    assert "nothing is left to do" in CliRunner().invoke(app, arguments).output


def test_what_is_seldom_meant_is_told(run_folder: Path) -> None:
    for overrides, fragment in {
        ("train.examples_per_step=20",): "note: train.examples_per_step=20: there are 9 examples",
        ("data.group_by_prompt=true",): "note: data.group_by_prompt=true: no two rows",
        ("train.examples_per_step=1", "--ranks", "3"): "note: 2 of 3 ranks have nothing to do: a step has 1 example",
        ("model.dtype=bfloat16",): "note: parallel.deepspeed=zero3_cpu adds gradients up in bfloat16",
        ("model.dtype=bfloat16", "parallel.deepspeed=zero3_bf16", "data.evaluation=[]", "evaluation.eval_steps=0",
         "evaluation.eval_on_start=false"): None,
    }.items():  # fmt: skip
        arguments = ["check", str(run_folder / "run.yaml"), f"train.output_dir={run_folder / 'unused'}", *overrides]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        assert fragment in result.output if fragment else "note:" not in result.output


def test_check_tells_what_training_would_do(run_folder: Path) -> None:
    folder = run_folder / "unused"
    arguments = ["check", str(run_folder / "run.yaml"), f"train.output_dir={folder}", "--ranks", "3"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    for fragment in (
        "sdpa",
        "prefix sharing     on: architecture llama",
        "dropout            off",
        "data.train: 9 examples",
        "pairs.jsonl names the same data as data.train.0",
        "first step on 3 ranks: 5 examples, 5 pairs",
        "rank 2",
        "2, 2 per epoch",
        "can be trained",
    ):
        assert fragment in result.output
    assert not folder.exists()


def test_check_tells_of_one_example_and_of_columns_that_are_ignored(tmp_path: Path, run_folder: Path) -> None:
    row = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4], "score_chosen": 1, "source": "web"}
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps(row) + "\n")
    overrides = [f"train.output_dir={tmp_path}/unused", f"data.train.0.path={path}", "train.examples_per_step=1"]
    result = CliRunner().invoke(app, ["check", str(run_folder / "run.yaml"), *overrides])
    assert result.exit_code == 0, result.output
    assert "data.train: 1 example, tokens" in result.output
    assert "columns ignored: score_chosen, source\n" in result.output


def test_schema_and_version() -> None:
    schema = CliRunner().invoke(app, ["schema"])
    assert json.loads(schema.output) == json.loads((REPOSITORY / "configs" / "schema.json").read_text())
    table = CliRunner().invoke(app, ["schema", "--table"])
    assert table.output == (REPOSITORY / "docs" / "configuration.md").read_text()
    assert "| `beta` | number > 0 | `0.1` | Inverse temperature" in table.output
    losses = CliRunner().invoke(app, ["schema", "--losses"])
    assert losses.output == (REPOSITORY / "docs" / "losses.md").read_text()
    assert all(f"| `{name}` |" in losses.output for name in LOSS_TYPES)
    both = CliRunner().invoke(app, ["schema", "--table", "--losses"])
    assert both.exit_code == 2 and "give one of them" in both.output and "| `beta` |" not in both.output
    assert CliRunner().invoke(app, ["--version"]).output.strip() == f"dpo-dist {__version__}"


def test_deepspeed_launcher(tmp_path: Path, run_folder: Path) -> None:
    out = tmp_path / "out"
    with alone(num_ranks=2):
        done = launch(
            1, "deepspeed.launcher.runner", "--num_gpus", "2", "--module", "dpo_dist",
            "train", str(run_folder / "run.yaml"), f"train.output_dir={out}",
            cwd=REPOSITORY, env={"DS_ACCELERATOR": "cpu"},
        )  # fmt: skip
    succeeded(done)
    assert (out / "model" / "model.safetensors").is_file()
    assert "2 ranks on cpu" in done.stderr
    assert "built successfully" not in done.stdout  # what DeepSpeed prints on every rank


# ---- what is shown


def test_a_log_gets_lines_and_no_bar(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="dpo_dist")
    with reporting(10, 0, visible=True) as report:
        report(LINE)
    assert caplog.messages == [as_text(LINE, 10)]
    assert as_text(LINE, 10).startswith("step 3/10  loss 0.5000")
    assert "\r" not in capsys.readouterr().err


def test_a_terminal_gets_a_bar_and_no_lines(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", logger="dpo_dist")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with reporting(10, 2, visible=True) as report:
        report(LINE)
    assert caplog.messages == []
    assert "3/10" in capsys.readouterr().err


def test_other_ranks_show_nothing(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="dpo_dist")
    with reporting(10, 0, visible=False) as report:
        report(LINE)
    assert caplog.messages == []
    assert capsys.readouterr().err == ""
