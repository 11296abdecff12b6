"""A few of the random kills of `python -m tests.soak`."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.cores import alone
from tests.launching import kill_group, launch, start, succeeded
from tests.soak import CONFIG, lines, soak

pytestmark = [pytest.mark.thorough, pytest.mark.timeout(600)]


def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DPO_DIST_CACHE", str(tmp_path / "cache"))
    assert len(soak(tmp_path, 3, 3, [])) == 3


def test_ranks_without_their_torchrun_and_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While they finish their step the next start is refused, and told who trains; then it goes on exactly."""
    monkeypatch.setenv("DPO_DIST_CACHE", str(tmp_path / "cache"))
    (tmp_path / "run.yaml").write_text(CONFIG)
    run = ("train", "run.yaml", "train.max_steps=8", "checkpoint.resume=auto")
    slow = {"DPO_DIST_TESTING": "1", "DPO_DIST_FAULT": "slow=45@*:5:update"}
    with alone(2):
        first = start(2, "dpo_dist", *run, "train.output_dir=out", cwd=tmp_path, env=slow)
        _wait_until(lambda: (tmp_path / "out/checkpoints/step-000004").exists())
    try:
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        refused = launch(2, "dpo_dist", *run, "train.output_dir=out", cwd=tmp_path)
        assert refused.returncode == 1
        assert "train.output_dir=out: another run trains in this folder (process " in refused.stderr
        _wait_until(lambda: not (tmp_path / "out/.lock").exists())
    finally:
        kill_group(first)
        first.communicate(timeout=120)  # its ranks, which it no longer knows, hold the pipes
    assert (tmp_path / "out/checkpoints/step-000005").exists(), "they have saved after their step"
    for folder in ("out", "whole"):
        succeeded(launch(2, "dpo_dist", *run, f"train.output_dir={folder}", cwd=tmp_path))
    assert lines(tmp_path / "out") == lines(tmp_path / "whole")
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("out", "whole")]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[1])


def _wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.1)
