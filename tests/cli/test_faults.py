"""Faults planted in whole runs: numbers that are not finite, and ranks that hang."""

import json
import re
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from dpo_dist.cli import app
from dpo_dist.engine import TrainingEngine
from dpo_dist.metrics import WALL_CLOCK
from dpo_dist.packing import StepPlan
from dpo_dist.run import Run
from tests.forking import fork_ranks
from tests.golden.trajectories import FOLDER

CONFIG = (
    f"model: {{model_name_or_path: {FOLDER / 'tiny_policy'}, dtype: float32}}\n"
    f"data: {{train: [{{path: {FOLDER / 'pairs.jsonl'}, limit: 9}}]}}\n"
    "train: {output_dir: out, examples_per_step: 3, max_steps: 4, learning_rate: 0.001, shuffle: false}\n"
    "checkpoint: {save_steps: 1}\n"
    "log: {report_to: []}\n"
    "parallel: {deepspeed: zero0_cpu}\n"
)


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "run.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DPO_DIST_TESTING", "1")
    return tmp_path / "out"


def train(monkeypatch: pytest.MonkeyPatch, faults: str, *overrides: str, code: int = 0) -> str:
    monkeypatch.setenv("DPO_DIST_FAULT", faults)
    result = CliRunner().invoke(app, ["train", "run.yaml", *overrides])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    assert "Traceback" not in result.output
    return result.output


def train_lines(out: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "split" not in line]


# ---- the data


def test_data_that_cannot_be_read_end_a_run_at_the_step_that_needs_them(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step before is made, counted and saved while they are read, beside it."""
    stock, threads = Run.plan, list[threading.Thread]()

    def plan(run: Run, step: int) -> StepPlan:
        if step == 2:
            threads.append(threading.current_thread())
            raise OSError(5, "Input/output error", "examples.arrow")
        return stock(run, step)

    monkeypatch.setattr(Run, "plan", plan)
    result = CliRunner().invoke(app, ["train", "run.yaml"])
    assert isinstance(result.exception, OSError) and result.exception.filename == "examples.arrow"
    assert result.exit_code == 1
    assert len(train_lines(out)) == 2 and (out / "checkpoints" / "step-000002" / "manifest.json").is_file()
    assert len(threads) == 1 and threads[0] is not threading.current_thread()


# ---- numbers that are not finite


def files(tmp_path: Path) -> None:
    for stage in range(4):
        (tmp_path / f"zero{stage}.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.thorough), pytest.param(2), 3])
def test_a_step_that_is_not_finite_changes_nothing(
    out: Path, monkeypatch: pytest.MonkeyPatch, stage: int, dtype: str
) -> None:
    """Optimizer and weights are, bit by bit, those of a run that never saw the step."""
    files(out.parent)
    kind = (f"model.dtype={dtype}", f"parallel.deepspeed=zero{stage}.json", "health.non_finite=skip")
    constant = ("train.lr_scheduler_type=constant", *kind)
    said = train(monkeypatch, "nan@0:2:backward", *constant, "train.max_steps=2")
    assert "step 2 (examples " in said and "grad_norm=" in said
    assert "the weights stay as they are, and the run goes on (health.non_finite=skip)" in said
    assert "step 2/2  left out: 1  " in said
    lines = train_lines(out)
    assert [line["step"] for line in lines] == [1, 2] and "loss" in lines[0] and "skipped_steps" not in lines[0]
    assert lines[1]["skipped_steps"] == 1 and "loss" not in lines[1] and "grad_norm" not in lines[1]
    assert lines[1]["num_tokens"] == lines[0]["num_tokens"], "what is left out counts nowhere"
    train(monkeypatch, "", *constant, "train.max_steps=1", "train.output_dir=short")
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (out, out.with_name("short")))
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    # The optimizer too: the step after it equals the second of a run that never saw it, with the same examples.
    once = (*constant, "data.train.0.limit=3")
    train(monkeypatch, "nan@0:2:backward", *once, "train.max_steps=3", "train.output_dir=three")
    train(monkeypatch, "", *once, "train.max_steps=2", "train.output_dir=two")
    ours, theirs = (load_file(out.with_name(name) / "model" / "model.safetensors") for name in ("three", "two"))
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_a_resumed_run_knows_how_many_steps_in_a_row_were_left_out(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skip = ("health.non_finite=skip", "health.max_skipped_steps=2")
    faults = "nan@0:2:backward,nan@0:3:backward,nan@0:4:backward"
    train(monkeypatch, faults, *skip, "train.max_steps=3")
    said = train(monkeypatch, faults, *skip, "checkpoint.resume=auto", code=1)
    assert re.search(r"error: step 4 \(examples .*\): grad_norm=\S+; more than health.max_skipped_steps=2 steps", said)
    assert not (out / "checkpoints" / "step-000004").exists()
    # One that is finite ends the row.
    train(monkeypatch, "nan@0:2:backward,nan@0:4:backward", *skip, "train.output_dir=other")


def test_lines_over_several_steps_are_means_over_those_that_count(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ("health.non_finite=skip", "log.logging_steps=4")
    train(monkeypatch, "nan@0:4:backward", *settings)
    train(monkeypatch, "", "log.logging_steps=3", "train.output_dir=whole")
    (ours,), theirs = train_lines(out), train_lines(out.with_name("whole"))[0]
    assert ours["skipped_steps"] == 1 and ours["loss"] == pytest.approx(theirs["loss"], rel=0.02)
    assert ours["tokens_processed"] == theirs["tokens_processed"]


def test_by_default_such_a_step_ends_the_run(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = train(monkeypatch, "nan@0:2:backward", code=1)
    place = re.escape(f"{FOLDER}/pairs.jsonl")
    assert re.search(
        rf"error: step 2 \(examples {place}:4, {place}:5, {place}:6\): grad_norm=\S+; what was saved", said
    )
    assert "leave such steps out with health.non_finite=skip" in said
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"step-000001", "latest"}


def test_a_ruined_model_is_neither_saved_nor_exported(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last update of a run can ruin it unseen: no loss is computed after it."""
    real = TrainingEngine.step

    def ruinous(engine: TrainingEngine, learning_rate: float) -> torch.Tensor:
        norm = real(engine, learning_rate)
        list(engine.named_shares())[5][1][3] = torch.inf
        return norm

    monkeypatch.setattr(TrainingEngine, "step", ruinous)
    said = train(monkeypatch, "", "train.max_steps=1", "checkpoint.save_steps=0", code=1)
    ruined = r"error: after step 1 \S+ is not finite: the model is ruined, and neither saved nor exported"
    assert re.search(ruined, said)
    assert not (out / "model").exists() and not list((out / "checkpoints").glob("step-*"))


# ---- ranks that hang


def launch_with(out: Path, faults: str, deepspeed: str = "zero0_cpu") -> tuple[int, str, float]:
    started = time.monotonic()
    done = fork_ranks(
        2,
        "dpo_dist",
        "train",
        "run.yaml",
        "parallel.ddp_timeout=6",
        f"parallel.deepspeed={deepspeed}",
        cwd=out.parent,
        env={"DPO_DIST_TESTING": "1", "DPO_DIST_FAULT": faults},
    )
    return done.returncode, done.stderr, time.monotonic() - started


@pytest.mark.parametrize(
    ("fault", "who"),
    [
        pytest.param(
            "stop@1:2:forward", "rank 1 does not answer: stopped, or its machine is gone", marks=pytest.mark.thorough
        ),
        ("hang@1:2:forward", "rank 1 does not get any further than step 2, forward"),
        # Where the other rank waits in ZeRO-3's own calls, only the collectives that each has begun tell who is behind.
        ("hang@1:2:backward", "rank 1 does not get any further than step 2, backward"),
        pytest.param("stop@0:3:save", "rank 0 does not answer", marks=pytest.mark.thorough),
        pytest.param(
            "hang@0:2:agree", "rank 0 does not get any further than step 2, agree", marks=pytest.mark.thorough
        ),
    ],
)
def test_a_rank_that_hangs_is_named_and_all_end(out: Path, fault: str, who: str) -> None:
    file = "zero3_cpu" if "backward" in fault else "zero0_cpu"
    code, said, seconds = launch_with(out, fault, file)
    assert code in (1, -signal.SIGKILL) and seconds < 60  # the server of the tests kills one that is stopped
    assert who in said and "nothing has moved for parallel.ddp_timeout=6 seconds" in said, said
    hanging = 1 if "@1" in fault else 0
    names = {path.name for path in (out / "hang").iterdir()}
    expected = {f"rank-{rank:05d}.txt" for rank in (0, 1) if "stop" not in fault or rank != hanging}
    assert names == expected
    if "hang" in fault:
        assert "_strike" in (out / "hang" / f"rank-{hanging:05d}.txt").read_text(), "where it hangs"
    checkpoints = {path.name for path in (out / "checkpoints").glob("step-*")}
    assert "step-000001" in checkpoints
    # And the next start goes on from there.
    done = fork_ranks(2, "dpo_dist", "train", "run.yaml", "checkpoint.resume=auto", cwd=out.parent)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in train_lines(out)] == [1, 2, 3, 4]
    assert not (out / "hang").exists()


def test_a_rank_that_is_killed_ends_all(out: Path) -> None:
    code, said, seconds = launch_with(out, "kill@1:2:backward")
    assert code and seconds < 60 and "hang" not in {path.name for path in out.iterdir()}, said


# ---- saving while training goes on

BACKGROUND = ("checkpoint.async_save=true", "train.max_steps=5")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def same_numbers(folder: Path, other: Path) -> None:
    lines = [
        [{k: v for k, v in line.items() if k not in WALL_CLOCK} for line in train_lines(f)] for f in (folder, other)
    ]
    assert lines[0] == lines[1]
    ours, theirs = weights(folder), weights(other)
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in theirs)


@pytest.mark.parametrize("stage", [0, pytest.param(2, marks=pytest.mark.thorough), 3])
def test_a_checkpoint_in_the_background_is_the_same(out: Path, monkeypatch: pytest.MonkeyPatch, stage: int) -> None:
    """Each one is of its own step, though training went on while it was written."""
    files(out.parent)
    kind = f"parallel.deepspeed=zero{stage}.json"
    said = train(monkeypatch, "slow=0.2@0:*:save.written", *BACKGROUND, kind)
    train(monkeypatch, "", "train.max_steps=5", kind, "train.output_dir=waited")
    same_numbers(out, out.with_name("waited"))
    lines = said.splitlines()
    first = next(n for n, line in enumerate(lines) if "saved out/checkpoints/step-000001" in line)
    assert any("step 2/5" in line for line in lines[:first]), "training went on"
    for step in (1, 3):
        folder = f"out/checkpoints/step-{step:06d}"
        train(monkeypatch, "", "train.max_steps=5", kind, f"checkpoint.resume={folder}", f"train.output_dir=from{step}")
        ours, theirs = weights(out.with_name(f"from{step}")), weights(out)
        assert all(ours[name].equal(theirs[name]) for name in theirs), step


def test_a_background_save_that_fails_is_tried_again(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = train(monkeypatch, "full=2@0:*:save.written", *BACKGROUND, "checkpoint.save_steps=2")
    assert "disk full" in said and "training goes on" in said
    train(monkeypatch, "", "train.max_steps=5", "checkpoint.save_steps=2", "train.output_dir=waited")
    same_numbers(out, out.with_name("waited"))
    assert [path.name for path in sorted((out / "checkpoints").glob("step-*"))] == ["step-000005"]


def test_a_failed_background_save_does_not_end_a_run_that_is_asked_to_stop(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint that follows the request may well find room."""
    faults = "full=1@0:*:save.written,term@0:2:forward,slow=0.3@0:2:update"
    said = train(monkeypatch, faults, *BACKGROUND)
    assert "disk full" in said and "stopped after step 2 of 5" in said
    assert [path.name for path in (out / "checkpoints").glob("step-*")] == ["step-000002"]


def test_a_copy_that_does_not_fit_is_a_save_that_failed(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(state: object) -> object:
        raise MemoryError

    monkeypatch.setattr("dpo_dist.checkpoint.shards.on_host", no_room)
    said = train(monkeypatch, "", *BACKGROUND)
    assert "does not fit into host memory" in said and "set it to false" in said and "training goes on" in said
    assert [path.name for path in (out / "checkpoints").glob("step-*")] == ["step-000005"], "which needs no copy"


def test_the_first_loss_is_checked_at_the_first_step_that_counts(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = train(monkeypatch, "nan@0:1:backward", "health.non_finite=skip", "train.max_steps=2")
    assert "self-check: first loss 0.693147 equals its closed form" in said.split("step 2/2")[0]


def test_what_was_being_written_when_a_run_ended_by_its_numbers_is_kept(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(monkeypatch, "slow=1@0:*:save.written,nan@0:2:backward", *BACKGROUND, code=1)
    assert (out / "checkpoints" / "step-000001" / "manifest.json").is_file()


def test_a_kill_while_a_checkpoint_is_written_leaves_the_older_one(out: Path) -> None:
    faults = "slow=60@1:2:save.written,kill@0:3:update"
    shell = {"DPO_DIST_TESTING": "1", "DPO_DIST_FAULT": faults}
    done = fork_ranks(2, "dpo_dist", "train", "run.yaml", *BACKGROUND, cwd=out.parent, env=shell)
    assert done.returncode and {path.name for path in (out / "checkpoints").glob("*")} >= {"step-000001"}
    assert not (out / "checkpoints" / "step-000002").exists()
    for overrides in (("checkpoint.resume=auto", *BACKGROUND), ("train.output_dir=whole", "train.max_steps=5")):
        done = fork_ranks(2, "dpo_dist", "train", "run.yaml", *overrides, cwd=out.parent)
        assert done.returncode == 0, done.stderr
    same_numbers(out, out.with_name("whole"))
