"""The folder of a run: always one that can go on, never two runs in it; only the finished model is finished."""

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from dpo_dist.cli import app, precomputing, run_folder, training
from dpo_dist.errors import ConfigError, NumericsError
from tests.golden.trajectories import FOLDER
from tests.launching import REPOSITORY
from tests.tiny_engine import only_rank

CONFIG = (
    f"model: {{model_name_or_path: {FOLDER / 'tiny_policy'}, dtype: float32}}\n"
    f"data: {{train: [{{path: {FOLDER / 'pairs.jsonl'}, limit: 9}}]}}\n"
    "train: {output_dir: out, examples_per_step: 3, max_steps: 2, learning_rate: 0.001}\n"
    "checkpoint: {save_steps: 1}\n"
    "parallel: {deepspeed: zero0_cpu}\n"
)


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "run.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "out"


def train(*overrides: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["train", "run.yaml", *overrides])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    assert "Traceback" not in result.output
    return result


def plant(monkeypatch: pytest.MonkeyPatch, faults: str) -> None:
    """Faults of the run, as `phases.arm` reads them."""
    monkeypatch.setenv("DPO_DIST_TESTING", "1")
    monkeypatch.setenv("DPO_DIST_FAULT", faults)


def steps(out: Path) -> list[int]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if "split" not in line]


def contents(out: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and "tfevents" not in path.name}


def test_what_is_made_is_for_its_owner_alone_and_what_exists_stays(out: Path) -> None:
    def modes(*folders: Path) -> list[int]:
        return [stat.S_IMODE(folder.stat().st_mode) for folder in folders]

    given, empty = out.with_name("given"), out.with_name("empty")
    for folder in (given, empty):
        folder.mkdir()
        folder.chmod(0o755)
    train()
    train(f"train.output_dir={given}")
    assert modes(out, out / "model", given) == [0o700, 0o700, 0o755]
    checkpoint = str(out / "checkpoints" / "step-000002")
    for name in ("exported", "empty"):
        result = CliRunner().invoke(app, ["export", checkpoint, name])
        assert result.exit_code == 0, result.output
    assert modes(out.with_name("exported"), empty) == [0o700, 0o755]


# ---- a folder that can always be used again


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_what_a_start_leaves_that_was_killed_early_is_no_obstacle(out: Path, resume: str) -> None:
    (out / "tensorboard").mkdir(parents=True)
    (out / "tensorboard" / "events.out.tfevents.1").write_bytes(b"")
    (out / ".lock").write_text("process 1 on a machine that is gone")
    train(f"checkpoint.resume={resume}")
    assert steps(out) == [1, 2]
    assert not (out / ".lock").exists()


def test_a_self_check_that_fails_leaves_nothing(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise NumericsError("planted")

    monkeypatch.setattr(training, "prove", fails)
    train(code=1)
    assert not out.exists()
    monkeypatch.undo()
    os.chdir(out.parent)
    train()


def test_the_configuration_stands_before_anything_else_of_a_run(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at the very next moment, the run can be resumed."""

    def killed(*_: Any, **__: Any) -> None:
        assert {path.name for path in out.iterdir()} == {"config.yaml", ".lock"}
        raise KeyboardInterrupt

    monkeypatch.setattr(run_folder, "TRACKERS", {"tensorboard": killed})
    assert CliRunner().invoke(app, ["train", "run.yaml"]).exit_code
    monkeypatch.undo()
    os.chdir(out.parent)
    train("checkpoint.resume=auto")
    assert steps(out) == [1, 2]


def test_a_refused_resume_changes_nothing(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train()
    before = contents(out)

    def fails(*_: Any) -> None:
        raise NumericsError("planted")

    monkeypatch.setattr(training, "restore", fails)
    train("checkpoint.resume=auto", "train.max_steps=3", code=1)
    after = contents(out)
    assert after == before


def test_a_tracker_that_cannot_start_is_a_mistake(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise OSError("no space for events")

    monkeypatch.setattr(run_folder, "TRACKERS", {"tensorboard": fails})
    assert "log.report_to=tensorboard cannot be started (OSError: no space for events)" in train(code=2).output


# ---- two runs in one folder


def test_a_second_run_is_told_who_trains(out: Path, tmp_path: Path) -> None:
    train()
    before = steps(out)
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom dpo_dist.cli.run_folder import _take\n"
        "fd = _take(Path(sys.argv[1]))\nprint('held', flush=True)\ntime.sleep(60)\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(out)], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        result = train("checkpoint.resume=auto", "train.max_steps=3", code=1)
        assert f"train.output_dir=out: another run trains in this folder (process {holder.pid} on " in result.output
        assert steps(out) == before
        told = f"another run trains in this folder (process {holder.pid} on "
        assert told in train("train.max_steps=3", code=2).output
        for resume, said in (("never", told), ("auto", f"note: another run trains in out (process {holder.pid} on ")):
            checked = CliRunner().invoke(app, ["check", "run.yaml", f"checkpoint.resume={resume}"])
            assert checked.exit_code == 0 and said in checked.output
    finally:
        holder.kill()
        holder.wait()
    # The system has freed the lock with its holder.
    train("checkpoint.resume=auto", "train.max_steps=3")
    assert steps(out) == [1, 2, 3]


def test_a_rank_ends_with_its_launcher(tmp_path: Path) -> None:
    """After kill -9 of torchrun its ranks would train on, beside those of the next start."""
    rank = (
        "import sys, time\nfrom dpo_dist.distributed import StopRequest, end_with_launcher\n"
        "end_with_launcher()\n"
        "with StopRequest().listening() as stop:\n"
        "    open(sys.argv[1], 'w').write('ready')\n"
        "    for _ in range(600):\n"
        "        time.sleep(0.05)\n"
        "        if stop.requested:\n"
        "            open(sys.argv[1], 'w').write('asked to stop')\n"
        "            break\n"
    )
    launcher = (
        "import os, subprocess, sys, time\n"
        "os.environ['TORCHELASTIC_RUN_ID'] = 'x'\n"
        "subprocess.Popen([sys.executable, '-c', sys.argv[1], sys.argv[2]])\ntime.sleep(60)\n"
    )
    said = tmp_path / "said"
    process = subprocess.Popen([sys.executable, "-c", launcher, rank, str(said)], cwd=REPOSITORY)
    try:
        _wait_for(said, "ready")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    _wait_for(said, "asked to stop")


def _wait_for(path: Path, text: str) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() or path.read_text() != text:
        assert time.monotonic() < deadline, text
        time.sleep(0.05)


# ---- the finished model


def _cut(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])


def _flip(model: Path) -> None:
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(bytes(content))


DAMAGES = {
    "cut": _cut,
    "one bit": _flip,
    "deleted": lambda model: (model / "model.safetensors").unlink(),
    "tokenizer or config deleted": lambda model: (model / "config.json").unlink(),
    "no record": lambda model: (model / run_folder.MODEL_RECORD).unlink(),
    "damaged record": lambda model: (model / run_folder.MODEL_RECORD).write_text("{"),
}


@pytest.mark.parametrize(
    "damage", [name if name == "one bit" else pytest.param(name, marks=pytest.mark.thorough) for name in DAMAGES]
)
def test_a_model_that_is_not_whole_is_written_again(out: Path, damage: str) -> None:
    train()
    model = out / "model"
    whole = {path.name: path.read_bytes() for path in model.iterdir()}
    assert "nothing is left to do" in train("checkpoint.resume=auto").output
    DAMAGES[damage](model)
    assert "nothing is left to do" not in train("checkpoint.resume=auto").output
    assert {path.name: path.read_bytes() for path in model.iterdir()} == whole


def test_the_model_of_an_earlier_end_is_not_the_finished_one(out: Path, tmp_path: Path) -> None:
    """Finished at 2 steps, extended to 3, killed before the export, copied: times say nothing any more."""
    train()
    earlier = tmp_path / "earlier"
    shutil.copytree(out / "model", earlier)
    train("checkpoint.resume=auto", "train.max_steps=3")
    finished = (out / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(out / "model")
    shutil.copytree(earlier, out / "model")
    assert finished != (out / "model" / "model.safetensors").read_bytes()
    assert "nothing is left to do" not in train("checkpoint.resume=auto", "train.max_steps=3").output
    assert (out / "model" / "model.safetensors").read_bytes() == finished


# ---- a full disk


def test_a_save_that_fails_is_tried_again(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, "full@0:1:save.publish")
    result = train("train.max_steps=3")
    assert "disk full: need more than was left" in result.output and "training goes on" in result.output
    names = {path.name for path in (out / "checkpoints").iterdir()}
    assert names == {"step-000002", "step-000003", "latest"}
    undisturbed = train("train.max_steps=3", "train.output_dir=other")
    assert undisturbed.exit_code == 0
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (out, out.with_name("other"))]
    assert weights[0] == weights[1]


def test_the_last_save_that_fails_is_no_mistake_of_the_users(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, "full@0:2:save.written")
    assert "disk full" in train(code=1).output


def test_lines_wait_for_room(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The last lines: only the checkpoint brings them to the disk.
    plant(monkeypatch, "full=1@0:2:metrics,full=1@0:3:metrics")
    result = train("train.max_steps=3", "checkpoint.save_steps=0")
    assert "its lines are kept and written later" in result.output
    assert steps(out) == [1, 2, 3]


def test_room_is_looked_for_before_the_first_step(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "free_bytes", lambda folder: 1000)
    assert "a checkpoint takes about" in train(code=1).output
    assert not (out / "metrics.jsonl").exists()
    size = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(FOLDER / "tiny_policy").parameters()) * 12
    monkeypatch.setattr(run_folder, "free_bytes", lambda folder: int(1.5 * size))
    assert "a second one does not fit" in train("train.output_dir=other").output


# ---- a request to stop


def test_a_request_is_heard_while_reference_values_are_computed(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, "term@0:0:cache")
    monkeypatch.setenv("DPO_DIST_CACHE", str(out.parent / "cache"))
    settings = ("reference.source=cache", "packing.max_tokens=95", "packing.reference_max_tokens=95")
    result = train(*settings)
    assert "SIGTERM: stopping" in result.output and "stopped before the first step" in result.output
    assert not out.exists()
    monkeypatch.undo()
    os.chdir(out.parent)
    monkeypatch.setenv("DPO_DIST_CACHE", str(out.parent / "cache"))
    assert "values found" in train(*settings).output


# ---- what ends a run


def test_a_number_that_is_not_finite_names_the_examples_of_its_step(out: Path) -> None:
    result = train("train.learning_rate=1e30", "train.max_steps=4", "train.shuffle=false", code=1)
    pattern = rf"error: step \d \(examples {re.escape(str(FOLDER))}/pairs\.jsonl:\d, \S+, \S+\d\): (loss|grad_norm)="
    assert re.search(pattern, result.output), result.output
    names = {path.name for path in (out / "checkpoints").iterdir()} if (out / "checkpoints").exists() else set()
    assert "step-000004" not in names and not (out / "model").exists()


@pytest.mark.parametrize(("command", "module"), [("train", training), ("precompute", precomputing)])
def test_how_long_a_rank_waits_for_the_others(
    out: Path, monkeypatch: pytest.MonkeyPatch, command: str, module: Any
) -> None:
    seen = []

    def group(timeout: timedelta, release: Any) -> None:
        seen.append(timeout.total_seconds())
        raise NumericsError("far enough")

    monkeypatch.setattr(module, "process_group", group)
    monkeypatch.setenv("DPO_DIST_CACHE", str(out.parent / "cache"))
    CliRunner().invoke(app, [command, "run.yaml"])
    CliRunner().invoke(app, [command, "run.yaml", "parallel.ddp_timeout=77"])
    assert seen == [1800, 77]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_too_little_memory_is_one_line_with_advice(
    out: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr(training, "train", fails)
    result = train(code=1)
    assert "error: out of memory; lower packing.max_tokens" in result.output and "\nmore" not in result.output


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch, out: Path) -> None:
    def nowhere(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("DPO_DIST_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "expanduser", nowhere)
    assert "this user has no home folder; set DPO_DIST_CACHE" in CliRunner().invoke(app, ["demo-model"]).output


# ---- a folder that is another one on another machine


@pytest.mark.parametrize("theirs", ["process 7 on node0, since 2026-11-28 10:00:00", "no lock (FileNotFoundError)"])
def test_a_folder_that_machines_do_not_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, theirs: str) -> None:
    ranks = only_rank()
    out = tmp_path / "out"
    with run_folder.locked(out, ranks):
        monkeypatch.setattr(run_folder, "_PATIENCE", 0.0)
        run_folder._require_shared(out, ranks)
        monkeypatch.setattr(run_folder, "broadcast_json", lambda value: ["node0", theirs])
        says = rf"train\.output_dir={out} on rank 0 \(\S+\) is not the folder that the first rank has there \(node0\)"
        with pytest.raises(ConfigError, match=says):
            run_folder._require_shared(out, ranks)
    assert not out.exists()


def test_a_file_system_that_shows_the_lock_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As NFS does."""
    ranks = only_rank()
    seen = iter(["lock", "no lock", "lock"])
    monkeypatch.setattr(run_folder, "_seen", lambda folder: next(seen))
    run_folder._require_shared(tmp_path, ranks)
    assert not list(seen)
