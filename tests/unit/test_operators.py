"""Locks of compilations: dead ones are removed, others are waited for; real processes in a made-up folder."""

import fcntl
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dpo_dist.engine import operators
from dpo_dist.engine.operators import is_dead, load_operator, only_compiler
from tests.launching import environment

# As torch takes its lock, holds it open, and is killed.
HOLDER = """
import os, sys, time
os.open(sys.argv[1], os.O_CREAT | os.O_EXCL)
print('ready', flush=True)
time.sleep(60)
"""
# As a rank of ours, which is killed while torch compiles.
COMPILER = f"""
import sys
from pathlib import Path
from dpo_dist.engine.operators import only_compiler
with only_compiler(Path(sys.argv[1]).parent):
    exec({HOLDER!r})
"""


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    folder = tmp_path / "deepspeed_shm_comm"
    folder.mkdir()
    return folder / "lock"


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def one(code: str, *arguments: object, cwd: Path | None = None) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, *map(str, arguments)]
        process = subprocess.Popen(command, cwd=cwd, env=environment(), stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert any(line == "ready\n" for line in process.stdout), "it has ended"  # DeepSpeed prints as well
        return process

    yield one
    for process in started:
        kill(process)
        assert process.stdout is not None
        process.stdout.close()


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()


def make_old(lock: Path, seconds: float = 1000) -> None:
    for path in (lock, lock.parent):
        os.utime(path, (time.time() - seconds,) * 2)


def test_a_lock_is_dead_when_its_holder_is_killed(lock: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    holder = start(HOLDER, lock)
    make_old(lock)
    assert not is_dead(lock, 600.0)
    kill(holder)
    assert is_dead(lock, 600.0)


def test_a_compiler_that_outlives_its_rank_keeps_the_lock(
    lock: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    lock.touch()
    compiler = start("import time; print('ready', flush=True); time.sleep(60)", cwd=lock.parent)
    make_old(lock)
    assert not is_dead(lock, 600.0)
    kill(compiler)
    assert is_dead(lock, 600.0)


def test_a_lock_of_an_unknown_holder_lives_while_its_folder_changes(lock: Path) -> None:
    lock.touch()
    make_old(lock)
    (lock.parent / "shm.o").touch()  # as on another machine, which cannot be seen
    assert not is_dead(lock, 600.0)


def test_a_process_that_cannot_be_looked_into_may_hold_it(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock.touch()
    make_old(lock)
    iterate = Path.iterdir

    def refused(path: Path) -> Iterator[Path]:
        if path == Path(f"/proc/{os.getpid()}/fd"):
            raise PermissionError(path)
        return iterate(path)

    monkeypatch.setattr(Path, "iterdir", refused)
    assert not is_dead(lock, 600.0)
    os.chown(lock, 12345, -1) if os.geteuid() == 0 else pytest.skip("only root can make another user's file")
    assert is_dead(lock, 600.0)


@pytest.mark.timeout(60)
def test_what_a_killed_rank_of_ours_left_is_removed_at_once(
    lock: Path, start: Callable[..., subprocess.Popen[str]], caplog: pytest.LogCaptureFixture
) -> None:
    first = start(COMPILER, lock)
    own = os.open(lock.parent.with_name(".deepspeed_shm_comm.dpo_dist"), os.O_RDWR)
    with pytest.raises(BlockingIOError):  # a second rank waits for it
        fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(own)
    kill(first)
    assert lock.exists()
    with only_compiler(lock.parent):
        assert not lock.exists()
    assert f"{lock} was left by a process that was killed; it is removed" in caplog.text


def test_the_note_of_another_boot_proves_nothing(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock.touch()
    own = lock.parent.with_name(".deepspeed_shm_comm.dpo_dist")
    own.write_text("another boot")
    quiets = []

    def judged(path: Path, quiet: float) -> bool:
        quiets.append(quiet)
        return True

    monkeypatch.setattr(operators, "is_dead", judged)
    with only_compiler(lock.parent):
        assert own.read_text() == operators._boot_id()
    assert quiets == [operators.QUIET] and own.read_text() == ""


def test_what_is_waited_for_is_said_again_and_again(
    lock: Path,
    start: Callable[..., subprocess.Popen[str]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start(HOLDER, lock)
    monkeypatch.setattr(operators, "SAY_EVERY", 0.05)
    waited = []

    pause = time.sleep

    def until_two_lines(seconds: float) -> None:
        waited.append(seconds)
        if caplog.text.count(f"waiting for {lock}, with which another process compiles") >= 2:
            lock.unlink(missing_ok=True)
        pause(seconds)

    monkeypatch.setattr(operators.time, "sleep", until_two_lines)
    with only_compiler(lock.parent):
        pass
    assert "remove that file" in caplog.text and len(waited) >= 2


def test_without_locks_of_the_system_nothing_is_removed(
    lock: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock.touch()
    make_old(lock)

    def none(descriptor: int, operation: int) -> None:
        raise OSError("no locks here")

    monkeypatch.setattr(fcntl, "flock", none)
    monkeypatch.setattr(operators, "SAY_EVERY", 0.0)
    monkeypatch.setattr(operators.time, "sleep", lambda seconds: lock.unlink())  # by hand, as the line says
    with only_compiler(lock.parent):
        pass
    assert f"waiting for {lock}" in caplog.text and "is removed" not in caplog.text


@pytest.mark.parametrize("is_built", [False, True])
def test_a_compilation_is_said_by_the_first_rank_alone(
    is_built: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Builder:
        NAME = name = "deepspeed_shm_comm"
        loads = 0

        def load(self) -> None:
            Builder.loads += 1
            print("what ninja says")

    class Accelerator:
        def create_op_builder(self, name: str) -> Builder | None:
            return Builder() if name == "ShareMemCommBuilder" else None

    monkeypatch.setattr(operators, "get_accelerator", Accelerator)
    monkeypatch.setattr(operators, "_get_build_directory", lambda name, verbose: str(tmp_path / name))
    (tmp_path / Builder.name).mkdir()
    if is_built:
        (tmp_path / Builder.name / f"{Builder.name}.so").touch()
    caplog.set_level(logging.INFO, "dpo_dist")
    load_operator("ShareMemCommBuilder")
    said = f"DeepSpeed compiles its operator {Builder.name}, once on this machine: about a minute, in {tmp_path}"
    assert (said in caplog.text) == (not is_built)
    caplog.clear()
    monkeypatch.setenv("LOCAL_RANK", "1")
    load_operator("ShareMemCommBuilder")
    load_operator("AnotherBuilder")
    assert not caplog.text and Builder.loads == 2
