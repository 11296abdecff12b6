"""A request to stop, whatever a run is doing: exit code 0, nothing lost, and the next start makes one run of both."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from dpo_dist.cli import app
from dpo_dist.metrics import WALL_CLOCK
from tests.golden.trajectories import FOLDER

PAIRS = FOLDER / "pairs.jsonl"
CONFIG = f"""\
model: {{model_name_or_path: {FOLDER / "tiny_policy"}, dtype: float32}}
data:
  train: [{{path: {PAIRS}, limit: 9}}]
  evaluation: [{{path: few.jsonl}}, {{path: many.jsonl}}]
train: {{output_dir: out, examples_per_step: 3, max_steps: 4, learning_rate: 0.001}}
packing: {{reference_max_tokens: 100}}
evaluation: {{eval_steps: 2}}
log: {{report_to: [], logging_steps: 1}}
checkpoint: {{save_steps: 1, resume: auto}}
parallel: {{deepspeed: zero0_cpu}}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "run.yaml").write_text(CONFIG)
    rows = PAIRS.read_text().splitlines(keepends=True)
    (tmp_path / "few.jsonl").write_text("".join(rows[:4]))
    (tmp_path / "many.jsonl").write_text("".join(rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DPO_DIST_TESTING", "1")
    return tmp_path


def train(monkeypatch: pytest.MonkeyPatch, faults: str, *overrides: str) -> str:
    monkeypatch.setenv("DPO_DIST_FAULT", faults)
    result = CliRunner().invoke(app, ["train", "run.yaml", *overrides])
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    assert "Traceback" not in result.output
    return result.output


def outcome(out: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Lines without what depends on the clock, and the model's weights."""
    read = (json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines())
    lines = [{key: value for key, value in line.items() if key not in WALL_CLOCK} for line in read]
    return lines, {name: value.tolist() for name, value in load_file(out / "model/model.safetensors").items()}


@pytest.mark.parametrize("step", [2, 4])
def test_during_an_evaluation(monkeypatch: pytest.MonkeyPatch, folder: Path, step: int) -> None:
    """Which may take longer than a cluster waits."""
    said = train(monkeypatch, f"term@0:{step}:evaluation")
    assert f"stopped after step {step} of 4" in said
    written = [json.loads(line) for line in (folder / "out/metrics.jsonl").read_text().splitlines()]
    assert (step, "many") not in [(line["step"], line.get("dataset")) for line in written]
    assert (folder / f"out/checkpoints/step-{step:06d}").is_dir() and not (folder / "out/model").exists()

    train(monkeypatch, "")
    train(monkeypatch, "", "train.output_dir=whole")
    assert outcome(folder / "out") == outcome(folder / "whole")


def test_during_the_evaluation_at_the_start(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """There is nothing to save, and the next start begins anew."""
    start = "evaluation.eval_on_start=true"
    assert "stopped after step 0 of 4" in train(monkeypatch, "term@0:0:evaluation", start)
    train(monkeypatch, "", start)
    train(monkeypatch, "", start, "train.output_dir=whole")
    assert outcome(folder / "out") == outcome(folder / "whole")


def test_while_data_is_tokenised(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("DPO_DIST_CACHE", str(folder / "cache"))
    said = train(monkeypatch, "term@0:0:tokenise")
    assert "SIGTERM: stopped before the first step" in said
    assert not (folder / "out").exists()
    tokenised = [path for path in (folder / "cache").rglob("*") if path.is_dir() and list(path.glob("*.arrow"))]
    assert tokenised == [], "nothing that is not whole"
    train(monkeypatch, "")
    assert (folder / "out/model").is_dir()


@pytest.mark.parametrize("phase", ["save", "save.written", "save.publish"])
def test_during_a_save(monkeypatch: pytest.MonkeyPatch, folder: Path, phase: str) -> None:
    assert "stopped after step 3 of 4" in train(monkeypatch, f"term@0:2:{phase}")
    train(monkeypatch, "")
    train(monkeypatch, "", "train.output_dir=whole")
    assert outcome(folder / "out") == outcome(folder / "whole")
