"""A whole run that goes on with another number of ranks, or at another ZeRO stage: the numbers are those of one run.

16 steps over 10 examples, saved after 5. What follows is run to the end by others, from a copy of the run's folder.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_dist.metrics import WALL_CLOCK
from tests.forking import fork_ranks
from tests.golden.trajectories import FOLDER, base_config
from tests.launching import succeeded

pytestmark = pytest.mark.timeout(900)
SAVED_AT, STEPS = 5, 16
# Named by who saves and who goes on: ranks and ZeRO stage of each.
FIRST = {"2 ranks, ZeRO-3": (2, "3"), "1 rank, ZeRO-1": (1, "1"), "2 ranks, round robin": (2, "round_robin")}
THEN = {
    "2 ranks, ZeRO-3": [(1, 3), (1, 1), (4, 3), (2, 1), (2, 0)],
    "1 rank, ZeRO-1": [(2, 3), (1, 3), (2, 2)],
}
DEFAULT = {("2 ranks, ZeRO-3", 1, 1), ("2 ranks, ZeRO-3", 4, 3), ("1 rank, ZeRO-1", 2, 3)}
CASES = [
    pytest.param(*case, marks=[] if case in DEFAULT else pytest.mark.thorough)
    for case in ((first, *then) for first, others in THEN.items() for then in others)
]
# Options that put parameters in another order: DeepSpeed itself would load every value into another parameter.
OPTIONS = {
    "round_robin": {"stage": 2, "overlap_comm": False, "round_robin_gradients": True},
    "sub_groups": {"stage": 3, "overlap_comm": False, "sub_group_size": 500, "stage3_param_persistence_threshold": 0},
}
OTHER_OPTIONS = [
    ("2 ranks, round robin", 1, "1"),
    pytest.param("2 ranks, round robin", 2, "2", marks=pytest.mark.thorough),
    pytest.param("1 rank, ZeRO-1", 2, "round_robin", marks=pytest.mark.thorough),
    pytest.param("2 ranks, ZeRO-3", 2, "sub_groups", marks=pytest.mark.thorough),
]


def write_config(folder: Path) -> None:
    """A run whose reference follows its policy, with clipping, decay, and lines that end within an epoch."""
    config = base_config(Path("out"))
    config["data"] = {"train": [{"path": str(FOLDER / "pairs.jsonl"), "limit": 10}]}
    config["train"] |= {
        "output_dir": "out",
        "examples_per_step": 4,
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "linear",
        "warmup_steps": 3,
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "shuffle": True,
    }
    config["packing"]["max_tokens"] = 200
    config["reference"] = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.6}
    config["checkpoint"] = {"save_steps": SAVED_AT, "resume": "auto"}
    config["log"] = {"logging_steps": 1, "report_to": []}
    folder.mkdir()
    (folder / "run.yaml").write_text(yaml.safe_dump(config))


def train(folder: Path, ranks: int, stage: int | str, *overrides: str) -> str:
    """Run to the end, at a ZeRO stage or with one of OPTIONS; what was said."""
    file = f"zero{stage}_cpu"
    if stage in OPTIONS:
        file = f"{stage}.json"
        (folder / file).write_text(json.dumps({"zero_optimization": OPTIONS[str(stage)]}))
    arguments = ("dpo_dist", "train", "run.yaml", f"parallel.deepspeed={file}", *overrides)
    done = fork_ranks(ranks, *arguments, cwd=folder, timeout=300)
    succeeded(done)
    return done.stderr


def lines(folder: Path) -> list[dict[str, Any]]:
    read = (json.loads(line) for line in (folder / "out/metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in WALL_CLOCK} for line in read]


@pytest.fixture(scope="module")
def first_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs that nobody interrupted."""
    root = tmp_path_factory.mktemp("worlds")
    folders = {}
    for number, (name, (ranks, stage)) in enumerate(FIRST.items()):
        folders[name] = root / str(number)
        write_config(folders[name])
        # A float32 sum of 60 nats is rounded by up to 4e-6, of which beta is in the loss: it must stay below the bound.
        config = yaml.safe_load((folders[name] / "run.yaml").read_text())
        config["loss"]["beta"] = 0.03
        (folders[name] / "run.yaml").write_text(yaml.safe_dump(config))
        train(folders[name], ranks, stage)
    return folders


@pytest.mark.parametrize(("first", "ranks", "stage"), CASES)
def test_others_go_on(first_runs: dict[str, Path], tmp_path: Path, first: str, ranks: int, stage: int) -> None:
    assert "weights and optimizer are shared out anew" in goes_on(first_runs[first], tmp_path, ranks, stage)


@pytest.mark.parametrize(("first", "ranks", "options"), OTHER_OPTIONS)
def test_other_options_go_on(first_runs: dict[str, Path], tmp_path: Path, first: str, ranks: int, options: str) -> None:
    goes_on(first_runs[first], tmp_path, ranks, options)


def goes_on(whole: Path, tmp_path: Path, ranks: int, stage: int | str) -> str:
    """Go on from a copy, and compare every number with those of the whole run; what was said."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    for later in (folder / "out/checkpoints").iterdir():
        if later.name != f"step-{SAVED_AT:06d}":
            shutil.rmtree(later) if later.is_dir() else later.unlink()
    shutil.rmtree(folder / "out/model")

    said = train(folder, ranks, stage)
    assert f"resuming after step {SAVED_AT}" in said
    expected, found = lines(whole), lines(folder)
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    compared = 0
    for mine, theirs in zip(found, expected, strict=True):
        if mine["step"] <= SAVED_AT:
            assert mine == theirs
            continue
        for key in ("loss", "logps/chosen", "logps/rejected", "grad_norm", "learning_rate", "tokens_processed"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-6), (mine["step"], key)
            compared += 1
    assert compared == 6 * (STEPS - SAVED_AT)
    return said


@pytest.mark.thorough
def test_round_robin_gradients_change_no_number_of_adalora(tmp_path: Path) -> None:
    """Its penalty and its allocation read and set parameters that lie in parts."""
    seen = []
    for options in (2, "round_robin"):
        folder = tmp_path / str(options)
        write_config(folder)
        config = yaml.safe_load((folder / "run.yaml").read_text())
        del config["model"]["reference_name_or_path"]
        config["adapter"] = {"peft_type": "adalora", "init_r": 6, "target_r": 3, "tinit": 1, "tfinal": 1}
        config["reference"] = {"source": "adapter_off"}
        (folder / "run.yaml").write_text(yaml.safe_dump(config))
        train(folder, 2, options, "train.max_steps=5", "checkpoint.save_steps=0")
        seen.append(lines(folder))
    assert seen[0] == seen[1]
