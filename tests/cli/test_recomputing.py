"""`model.gradient_checkpointing=auto`: what the memory that is there decides, and that the numbers do not show it."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from dpo_dist.cli import app, recomputing
from tests.golden.trajectories import FOLDER, base_config


@pytest.fixture
def config(tmp_path: Path) -> Path:
    values: dict[str, Any] = base_config(tmp_path / "out")
    values["data"] = {"train": [{"path": str(FOLDER / "pairs.jsonl"), "limit": 4}]}
    values["train"] |= {"max_steps": 2, "examples_per_step": 2}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "run.yaml"


def train(config: Path, *overrides: str) -> tuple[str, list[Any], bytes]:
    """What it said, the losses and norms, and the weights."""
    out = config.parent / f"out-{len(list(config.parent.iterdir()))}"
    result = CliRunner().invoke(app, ["train", str(config), f"train.output_dir={out}", *overrides])
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    numbers = [[line.get("loss"), line.get("grad_norm")] for line in lines]
    weights = b"".join(path.read_bytes() for path in sorted((out / "model").glob("*.safetensors")))
    return result.output, numbers, weights


def test_memory_decides_and_numbers_stay(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    for free, said in (
        (1 << 40, "activations are kept in all 2 layers"),
        (0, "activations are recomputed in all 2 layers"),
    ):
        monkeypatch.setattr(recomputing, "free_bytes", lambda *_, free=free: free)
        text, *seen[free] = train(config)
        assert said in text
    text, *told = train(config, "model.gradient_checkpointing=true")
    assert "activations are" not in text  # nothing was decided
    assert told == seen[0] == seen[1 << 40]


def test_some_layers(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs: list[Any] = []
    measured = recomputing.measure_activations
    monkeypatch.setattr(recomputing, "measure_activations", lambda *a: needs.append(measured(*a)) or needs[-1])
    train(config)
    (memory,) = needs
    monkeypatch.setattr(recomputing, "_largest_micro_batch", lambda _: 1000)
    monkeypatch.setattr(recomputing, "free_bytes", lambda *_: int(memory.needed(1000, 1) / 0.85) + 1)
    assert "activations are recomputed in 1 of 2 layers" in train(config)[0]


def test_a_prefix_is_never_recomputed(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recomputing, "free_bytes", lambda *_: 0)
    text, *_ = train(config, "adapter.peft_type=prefix_tuning", "adapter.num_virtual_tokens=2")
    assert "activations are" not in text
