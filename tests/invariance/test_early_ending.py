"""A run that ends before its last step: by early stopping or a threshold, with the best checkpoint, also resumed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from dpo_dist import trainer
from dpo_dist.cli import app
from dpo_dist.metrics import WALL_CLOCK
from tests.forking import fork_ranks
from tests.golden.trajectories import FOLDER, base_config
from tests.launching import succeeded

pytestmark = pytest.mark.timeout(600)
STEPS = 12


def written(folder: Path, name: str, **sections: dict[str, Any]) -> Path:
    """Training on pairs that turn the held-out ones round: the longer, the worse."""
    rows = [json.loads(line) for line in (FOLDER / "pairs.jsonl").read_text().splitlines()]
    held_out = folder / "held_out.jsonl"
    turned = [{**row, "chosen_ids": row["rejected_ids"], "rejected_ids": row["chosen_ids"]} for row in rows[:5]]
    held_out.write_text("".join(json.dumps(row) + "\n" for row in [*turned, *rows[10:14]]))
    config = base_config(folder / name)
    config["data"]["evaluation"] = [{"path": str(held_out)}]
    config["train"] |= {"examples_per_step": 6, "max_steps": STEPS, "learning_rate": 3e-3}
    config["evaluation"] = {"eval_steps": 1, "metric_for_best_model": "loss", "early_stopping_patience": 2}
    config["checkpoint"] = {"save_steps": 0, "save_total_limit": 1, "resume": "auto"}
    config["parallel"]["deepspeed"] = "zero3_cpu"
    for section, values in sections.items():
        config[section] = config.get(section, {}) | values
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def train(path: Path, *overrides: str) -> str:
    result = CliRunner().invoke(app, ["train", str(path), *overrides])
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return result.stderr


def lines_of(out: Path) -> list[dict[str, Any]]:
    """Without what depends on the clock."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in WALL_CLOCK} for line in lines]


def losses_of(out: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in lines_of(out) if line.get("split") == "evaluation"}


def checkpoints_of(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").glob("step-*"))


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("ended")
    stderr = train(written(folder, "run", evaluation={"load_best_model_at_end": True}))
    return folder, stderr


def test_it_ends_after_so_many_evaluations_and_keeps_the_best(ended: tuple[Path, str]) -> None:
    folder, stderr = ended
    losses = losses_of(folder / "run")
    best, last = min(losses, key=lambda step: losses[step]), max(losses)
    assert 1 <= best == last - 2 < STEPS - 2
    assert checkpoints_of(folder / "run") == [f"step-{best:06d}", f"step-{last:06d}"]
    assert f"evaluation.early_stopping_patience=2: loss of held_out was best after step {best}" in stderr
    assert lines_of(folder / "run")[-1]["step"] == last


def test_the_model_is_the_best_one_and_not_the_last(ended: tuple[Path, str]) -> None:
    folder, _ = ended
    names = checkpoints_of(folder / "run")
    exported = []
    for name in names:
        result = CliRunner().invoke(app, ["export", str(folder / "run/checkpoints" / name), str(folder / name)])
        assert result.exit_code == 0, result.output
        exported.append(load_file(folder / name / "model.safetensors"))
    model = load_file(folder / "run/model/model.safetensors")
    assert all(model[name].equal(exported[0][name]) for name in model)
    assert not all(model[name].equal(exported[1][name]) for name in model)


def test_started_again_nothing_is_left_to_do_until_a_rule_changes(ended: tuple[Path, str]) -> None:
    folder, _ = ended
    before = lines_of(folder / "run")
    assert "nothing is left to do; with other settings of evaluation and health it would go on" in train(
        folder / "run.yaml"
    )
    assert lines_of(folder / "run") == before
    train(folder / "run.yaml", "evaluation.early_stopping_patience=4")
    after = lines_of(folder / "run")
    assert after[: len(before)] == before
    assert max(losses_of(folder / "run")) == max(line["step"] for line in before) + 2


def test_a_resumed_run_decides_as_one_that_never_stopped(tmp_path: Path) -> None:
    """From each checkpoint to the same end: lines, best step and the number of evaluations that were no better."""
    health = {"action": "stop", "check_pairs": 20, "max_displacement": 1.0, "max_kl": 1e9, "max_length_drift": 1.0}
    whole = written(tmp_path, "whole", checkpoint={"save_steps": 1, "save_total_limit": None}, health=health)
    train(whole)
    wanted = lines_of(tmp_path / "whole")
    last = max(losses_of(tmp_path / "whole"))
    state = json.loads((tmp_path / "whole/checkpoints" / f"step-{last:06d}/state.json").read_text())
    assert state["health"]["ended"] and state["health"]["sums"]
    for step in range(1, last):
        again = written(tmp_path, f"again{step}", health=health)
        train(again, f"checkpoint.resume={tmp_path}/whole/checkpoints/step-{step:06d}")
        out = tmp_path / f"again{step}"
        assert lines_of(out) == [line for line in wanted if line["step"] > step]
        resumed = json.loads((out / "checkpoints" / f"step-{last:06d}/state.json").read_text())
        assert resumed["health"] == state["health"]


def test_an_evaluation_that_a_stop_left_out_is_made_up_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And if a kill follows before the next checkpoint, its numbers are taken from the file, to the same end."""
    path = written(tmp_path, "run", checkpoint={"save_steps": 2})
    due, calls = trainer.evaluation_is_due, []
    with monkeypatch.context() as patched:
        patched.setattr(trainer, "evaluation_is_due", lambda run, step: step != 2 and due(run, step))
        train(path, "train.max_steps=2")
    shutil.copytree(tmp_path / "run", tmp_path / "killed")
    assert [step for step in losses_of(tmp_path / "run") if step] == [1]
    train(path, "train.max_steps=4")
    wanted = lines_of(tmp_path / "run")
    assert sorted(losses_of(tmp_path / "run")) == [1, 2, 3, 4]
    (made_up,) = [line for line in wanted if line["step"] == 2 and "split" in line]
    with (tmp_path / "killed/metrics.jsonl").open("a") as file:
        file.write(json.dumps(made_up) + "\n")
    evaluate = trainer.evaluate_all
    monkeypatch.setattr(trainer, "evaluate_all", lambda run, at: calls.append(at.step) or evaluate(run, at))
    train(path, "train.max_steps=4", f"train.output_dir={tmp_path}/killed")
    assert calls == [3, 4]
    assert lines_of(tmp_path / "killed") == wanted
    states = [
        json.loads((tmp_path / name / "checkpoints/step-000004/state.json").read_text()) for name in ("run", "killed")
    ]
    assert states[0]["health"] == states[1]["health"]


def test_ranks_decide_together_and_as_one_process_does(tmp_path: Path, ended: tuple[Path, str]) -> None:
    path = written(tmp_path, "two", packing={"max_tokens": 150})
    done = succeeded(fork_ranks(2, "dpo_dist", "train", str(path), cwd=tmp_path, timeout=300))
    assert "evaluation.early_stopping_patience=2: loss of held_out" in done.stderr
    one, two = losses_of(ended[0] / "run"), losses_of(tmp_path / "two")
    assert two == {step: pytest.approx(one[step], rel=1e-5) for step in two}
    assert (tmp_path / "two/model").is_dir()


def test_a_threshold_ends_the_run_with_a_checkpoint_and_a_model(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "stop",
        evaluation={"metric_for_best_model": None, "early_stopping_patience": None},
        health={"action": "stop", "check_pairs": 6, "max_displacement": 0.2},
    )
    stderr = train(path)
    assert "health.max_displacement=0.2: displacement is " in stderr and "loss.loss_type=[sigmoid, sft]" in stderr
    (name,) = checkpoints_of(tmp_path / "stop")
    step = int(name.removeprefix("step-"))
    assert step < STEPS
    lines = [line for line in lines_of(tmp_path / "stop") if "split" not in line]
    assert [line["displacement"] > 0.2 for line in lines] == [False] * (step - 1) + [True]
    assert (tmp_path / "stop/model/config.json").is_file()


def test_a_damaged_best_checkpoint_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, "run", evaluation={"load_best_model_at_end": True}, checkpoint={"save_steps": 1})
    train(path)
    best = min(losses_of(tmp_path / "run").items(), key=lambda item: item[1])[0]
    shard = next((tmp_path / f"run/checkpoints/step-{best:06d}/shards").rglob("*.pt"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    result = CliRunner().invoke(app, ["train", str(path), "evaluation.early_stopping_patience=3"])
    assert result.exit_code == 2
    assert f"step-{best:06d}" in result.stderr
