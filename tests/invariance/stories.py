"""Runs that show one thing each, besides the recorded cases: evaluation, epochs, idle ranks, the frozen reference."""

import json
from pathlib import Path
from typing import Any

from tests.golden.trajectories import FOLDER, base_config, load_rows

EVALUATION_ROWS = {"seven": 7, "one": 1}  # odd, and fewer than two ranks
EVALUATION_STEPS = (0, 2, 3)
EPOCH_EXAMPLES_PER_STEP = 5  # 24 rows: four steps of 5 and one of 4
EPOCHS = 2
SINGLE_EXAMPLE_STEPS = 4
FROZEN_STEPS = 3
STAGES_OF_SINGLE = (0, 2, 3)
STAGES_OF_FROZEN = (0, 3)


def story_configs(folder: Path) -> dict[str, dict[str, Any]]:
    """Name and configuration of every story; `folder/<name>` is its output folder."""
    stories = {"evaluation": _evaluation(folder), "epoch": _epoch(folder)}
    stories |= {f"single-stage{stage}": _single(folder, stage) for stage in STAGES_OF_SINGLE}
    stories |= {f"frozen-stage{stage}": _frozen(folder, stage) for stage in STAGES_OF_FROZEN}
    return stories


def _evaluation(folder: Path) -> dict[str, Any]:
    """Sequential pairs as in the case `sigmoid`, with two held-out sets."""
    config = base_config(folder / "evaluation")
    lines = (FOLDER / "pairs.jsonl").read_text().splitlines(keepends=True)
    sources = []
    for name, count in EVALUATION_ROWS.items():
        path = folder / f"{name}.jsonl"
        if not path.exists():  # the sets end with the last pair, so that they are not what is trained on first
            path.write_text("".join(lines[-count:]))
        sources.append({"path": str(path)})
    config["data"]["evaluation"] = sources
    config["evaluation"] = {"eval_steps": 2, "eval_on_start": True}
    config["train"] |= {"examples_per_step": 4, "max_steps": 3, "learning_rate": 1e-3}
    config["packing"] = {"max_tokens": 150, "reference_max_tokens": 200}
    config["parallel"]["deepspeed"] = "zero3_cpu"
    return config


def _epoch(folder: Path) -> dict[str, Any]:
    """Whole epochs in shuffled order, each with a shorter last step."""
    config = base_config(folder / "epoch")
    config["train"] |= {
        "examples_per_step": EPOCH_EXAMPLES_PER_STEP,
        "num_train_epochs": EPOCHS,
        "learning_rate": 1e-3,
        "shuffle": True,
        "seed": 7,
    }
    config["parallel"]["deepspeed"] = "zero2_cpu"
    return config


def _single(folder: Path, stage: int) -> dict[str, Any]:
    """One example per step: of two ranks one has nothing to do."""
    config = base_config(folder / f"single-stage{stage}")
    config["train"] |= {"examples_per_step": 1, "max_steps": SINGLE_EXAMPLE_STEPS, "learning_rate": 1e-3}
    config["parallel"]["deepspeed"] = f"zero{stage}_cpu"
    return config


def _frozen(folder: Path, stage: int) -> dict[str, Any]:
    """The policy's own starting weights as the reference, and a rate at which the policy moves far."""
    config = base_config(folder / f"frozen-stage{stage}")
    del config["model"]["reference_name_or_path"]
    config["train"] |= {"examples_per_step": 8, "max_steps": FROZEN_STEPS, "learning_rate": 1e-2}
    config["parallel"]["deepspeed"] = f"zero{stage}_cpu"
    return config


def evaluation_rows(name: str) -> tuple:
    """The rows of a held-out set."""
    return load_rows()[-EVALUATION_ROWS[name] :]


def write_request(path: Path, configs: dict[str, dict[str, Any]]) -> None:
    """What the worker reads: name and configuration of every run."""
    path.write_text(json.dumps(configs))
