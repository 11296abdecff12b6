"""The run that machines train together, and how its numbers are compared."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from dpo_dist.metrics import WALL_CLOCK
from tests.forking import fork_ranks
from tests.golden.trajectories import FOLDER, base_config
from tests.launching import REPOSITORY, succeeded

STEPS = 80


def write_config(folder: Path) -> None:
    """A ZeRO-3 run over the golden pairs with a checkpoint every five steps."""
    config = base_config(Path("out"))
    config["data"] = {"train": [{"path": str(FOLDER / "pairs.jsonl")}]}
    config["train"] |= {"output_dir": "out", "examples_per_step": 3, "max_steps": STEPS, "learning_rate": 1e-4}
    config["parallel"] = {"deepspeed": "zero3_cpu"}
    config["checkpoint"] = {"save_steps": 5}
    config["log"] = {"logging_steps": 1, "report_to": []}
    (folder / "run.yaml").write_text(yaml.safe_dump(config))


def environment(seconds_per_step: float = 0.0) -> dict[str, str]:
    """Variables of every process; a step is made to last."""
    slow = {"DPO_DIST_TESTING": "1", "DPO_DIST_FAULT": f"slow={seconds_per_step}@*:*:step"} if seconds_per_step else {}
    return {
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PATH": os.environ["PATH"],
        **slow,
    }


def reference_run(folder: Path) -> Path:
    """Two ranks on this machine, whom nobody interrupts."""
    write_config(folder)
    succeeded(fork_ranks(2, "dpo_dist", "train", "run.yaml", cwd=folder, timeout=300))
    return folder


def lines(folder: Path) -> list[dict[str, Any]]:
    """Of the metrics, without what depends on the clock."""
    read = (json.loads(line) for line in (folder / "out/metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in WALL_CLOCK} for line in read]


def compare(whole: Path, other: Path) -> None:
    """Equal to the last bit: lines and weights."""
    assert lines(other) == lines(whole)
    mine, theirs = (load_file(folder / "out/model/model.safetensors") for folder in (other, whole))
    assert mine.keys() == theirs.keys() and all(mine[name].equal(theirs[name]) for name in theirs)


def compare_nearly(whole: Path, other: Path, saved: int) -> None:
    """Equal but for rounding for ten steps after another number of ranks has gone on; rounding grows with training."""
    mine, theirs = lines(other), lines(whole)
    assert [line["step"] for line in mine] == [line["step"] for line in theirs]
    for one, two in zip(mine, theirs, strict=True):
        if "loss" in two and one["step"] <= saved + 10:
            assert one["loss"] == pytest.approx(two["loss"], rel=1e-6), one["step"]
