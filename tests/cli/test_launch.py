"""The launch scripts: what they say when something is missing, and that they leave no process behind."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SETUP = ROOT / "launch" / "setup.sh"

# A stand-in for torchrun: an agent, and a rank in a session of its own, as torchrun's are. The rank writes its id.
AGENT = "import subprocess, sys; sys.exit(subprocess.Popen(sys.argv[1:], start_new_session=True).wait())"
POLITE_RANK = (
    "import os, pathlib, signal, sys, time\n"
    "signal.signal(signal.SIGTERM, lambda *_: sys.exit(pathlib.Path('saved').write_text('')))\n"
    "pathlib.Path('rank').write_text(str(os.getpid()))\n"
    "time.sleep(60)"
)
DEAF_RANK = POLITE_RANK.replace("lambda *_: sys.exit(pathlib.Path('saved').write_text(''))", "signal.SIG_IGN")


def _bash(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run bash code after sourcing setup.sh, with `environment` added."""
    script = f"set -euo pipefail; source '{SETUP}'; {code}"
    return subprocess.run(
        ["bash", "-c", script], env=os.environ | environment, capture_output=True, text=True, check=False, timeout=60
    )


def _wait_until(condition, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextmanager
def _listening() -> Iterator[None]:
    """Under nohup, or in the background of a script, tests inherit ignored signals, which no shell can take over.

    Not by `preexec_fn`: that copies this process, which may have more memory mapped than the machine has.
    """
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.fixture
def start(tmp_path: Path) -> Iterator:
    """Start `run_stoppable AGENT RANK` in a process group of its own; gives the script and the rank's process id."""
    started: list[subprocess.Popen] = []

    def run(rank: str) -> tuple[subprocess.Popen, int]:
        script = f'set -euo pipefail; source \'{SETUP}\'; run_stoppable python3 -c "$1" python3 -c "$2"'
        with _listening():
            command = ["bash", "-c", script, "bash", AGENT, rank]
            process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True)
        started.append(process)
        _wait_until(lambda: (tmp_path / "rank").exists() and (tmp_path / "rank").read_text())
        return process, int((tmp_path / "rank").read_text())

    yield run
    for process in started:
        process.kill()


# ---- stopping


@pytest.mark.parametrize("request_to_stop", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_first_request_lets_the_ranks_save(start, tmp_path: Path, request_to_stop: signal.Signals) -> None:
    script, rank = start(POLITE_RANK)
    os.killpg(script.pid, request_to_stop)  # as the terminal does: every process of the foreground group
    assert script.wait(timeout=30) == 0
    assert (tmp_path / "saved").exists()
    assert not _is_alive(rank)


def test_second_request_ends_ranks_that_do_not_listen(start) -> None:
    script, rank = start(DEAF_RANK)
    os.killpg(script.pid, signal.SIGINT)
    time.sleep(1)
    assert script.poll() is None
    assert _is_alive(rank)
    os.killpg(script.pid, signal.SIGINT)
    assert script.wait(timeout=30) != 0
    assert not _is_alive(rank)


def test_what_a_command_leaves_behind_is_ended(tmp_path: Path) -> None:
    result = _bash(f"run_stoppable setsid --fork bash -c 'echo $$ > {tmp_path}/pid; exec sleep 60'; sleep 0.5")
    assert result.returncode == 0, result.stderr
    assert not _is_alive(int((tmp_path / "pid").read_text()))


def test_exit_code_is_the_commands() -> None:
    assert _bash("run_stoppable true").returncode == 0
    assert _bash("run_stoppable bash -c 'exit 7'").returncode == 7


# ---- what is missing


def test_missing_compiler_says_how_to_get_it() -> None:
    result = _bash("set_up demo", CXX="no-such-compiler")
    assert result.returncode == 2
    assert result.stderr.startswith("error: g++ not found")
    assert "apt-get install g++" in result.stderr


def test_python_that_is_too_old_is_refused(tmp_path: Path) -> None:
    old = tmp_path / "python3.10"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    result = _bash("set_up demo", DPO_DIST_PYTHON=str(old))
    assert result.returncode == 2
    assert result.stderr == f"error: DPO_DIST_PYTHON={old} is not a Python 3.11 or newer\n"


def test_environment_made_by_somebody_else_is_left_alone(tmp_path: Path) -> None:
    theirs = tmp_path / "venv"
    theirs.mkdir()
    (theirs / "precious").touch()
    result = _bash("set_up demo", DPO_DIST_VENV=str(theirs))
    assert result.returncode == 2
    assert f"{theirs} exists and was not made by these scripts" in result.stderr
    assert [path.name for path in theirs.iterdir()] == ["precious"]


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh"])
def test_help(script: str) -> None:
    result = subprocess.run(
        [ROOT / "launch" / script, "--help"], capture_output=True, text=True, check=True, timeout=20
    )
    assert f"./launch/{script}" in result.stdout
    assert "#" not in result.stdout
