"""Starts ranks as a user does, and never leaves one behind.

One place, because a forgotten process group blocks a port and a core for every test after it.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil

from tests.cores import alone

REPOSITORY = Path(__file__).resolve().parents[1]
# The launcher's own environment must not reach a launch inside a launch.
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")


def command(num_ranks: int, module: str, *arguments: str) -> list[str]:
    """What `launch` runs: `python -m module` for one rank, torchrun for more."""
    if num_ranks == 1:
        return [sys.executable, "-m", module, *arguments]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    return [*torchrun, "-m", module, *arguments]


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment with the repository importable, one thread per rank, and no rank variables."""
    inherited = {name: value for name, value in os.environ.items() if name not in _RANK_VARIABLES}
    return {
        **inherited,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH", "")])),
        # One thread per rank: sums are then taken in one order, and two ranks do not fight for the cores.
        "OMP_NUM_THREADS": "1",
        **(extra or {}),
    }


def start(
    num_ranks: int, module: str, *arguments: str, cwd: Path, env: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start ranks in a session of their own, for tests that send signals; end them with `kill_group`."""
    return subprocess.Popen(
        command(num_ranks, module, *arguments),
        cwd=cwd,
        env=environment(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def launch(
    num_ranks: int,
    module: str,
    *arguments: str,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    timeout: float = 600,
) -> subprocess.CompletedProcess[str]:
    """Run ranks to their end.

    Args:
        num_ranks: 1 runs the module directly; more go through torchrun on this machine.
        module: what `python -m` gets, e.g. `tests.checked`.
        arguments: of the module.
        cwd: working folder.
        env: variables to add.
        timeout: seconds until every process of the launch is killed.

    Raises:
        subprocess.TimeoutExpired: with what was printed until then.
    """
    with alone(num_ranks):
        process = start(num_ranks, module, *arguments, cwd=cwd, env=env)
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired as expired:
            kill_group(process)
            stdout, stderr = process.communicate()
            raise subprocess.TimeoutExpired(expired.cmd, expired.timeout, stdout, stderr) from None
        finally:
            kill_group(process)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def kill_group(process: subprocess.Popen[str]) -> None:
    """Kill whatever is left of a launch."""
    # torchrun gives every rank a session of its own, so its own group holds none of them.
    ranks = _descendants(process.pid)
    with contextlib.suppress(ProcessLookupError):  # all have ended by themselves
        os.killpg(process.pid, signal.SIGKILL)
    for pid in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def _descendants(pid: int) -> list[int]:
    """Processes that a running one has started, and those that these have started."""
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def succeeded(process: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    """The same, or a failure that shows what was printed."""
    assert process.returncode == 0, (
        f"exit code {process.returncode} of {process.args}\n--- stdout\n{process.stdout[-4000:]}"
        f"\n--- stderr\n{process.stderr[-8000:]}"
    )
    return process


def end_rank() -> None:
    """End a worker whose work is done, as dpo-dist ends a rank.

    DeepSpeed's hooks keep process groups with their threads alive, and these abort a process now and then.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
