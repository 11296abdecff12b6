"""Ranks that are forked from a process which has imported everything once, instead of being started anew.

For workers of the tests, and for runs where starting is not the subject: a rank then costs no import. A launch by
torchrun or deepspeed stays one (`launching.launch`) where the launch itself is tested. What forked ranks cannot show:
their calls are not type-checked, and all of them have the same hash seed, so that an order of a set which differs
between processes goes unseen. Real launches show both (`tests/invariance/conftest.py`, `golden/test_cli_golden.py`).

`python -m tests.forking` is that process. It reads a line of JSON for each launch and answers with one.
"""

import atexit
import contextlib
import gc
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.cores import alone
from tests.launching import REPOSITORY, environment

GRACE = 10.0  # seconds that the other ranks have to end by themselves after one has failed


@dataclass(frozen=True)
class Request:
    """One launch."""

    num_ranks: int
    module: str
    arguments: tuple[str, ...]
    cwd: str
    environment: dict[str, str]
    logs: str  # folder for what the ranks print
    timeout: float


class _Server:
    """The process that forks; started when it is first needed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(self, request: Request) -> list[int | None]:
        """Exit codes of the ranks; None for one that was killed at the time limit."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.forking"],
                cwd=REPOSITORY,
                env=environment({"DS_ACCELERATOR": "cpu"}),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            atexit.register(self.end)
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(asdict(request)) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BaseException:  # a test's own time limit, or Ctrl-C: the ranks end with the server
            self.end()
            raise
        if not answer:
            self.end()
            raise RuntimeError("the process that forks ranks has ended")
        return json.loads(answer)

    def end(self) -> None:
        """End the server and all ranks that it has."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
            self._process.kill()
            self._process.wait()
        self._process = None


_SERVER = _Server()


def fork_ranks(
    num_ranks: int,
    module: str,
    *arguments: str,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    timeout: float = 600,
) -> subprocess.CompletedProcess[str]:
    """As `launching.launch`: run ranks to their end.

    Returns:
        The exit code is the first one that is not 0.
    Raises:
        subprocess.TimeoutExpired: with what was printed until then.
    """
    with tempfile.TemporaryDirectory() as logs:
        variables = environment({"DS_ACCELERATOR": "cpu", **(env or {})})
        request = Request(num_ranks, module, arguments, str(cwd), variables, logs, timeout)
        with alone(num_ranks):
            codes = _SERVER.run(request)
        stdout, stderr = (
            "".join((Path(logs) / f"{name}{rank}").read_text(errors="replace") for rank in range(num_ranks))
            for name in ("stdout", "stderr")
        )
    command = [module, *arguments]
    if None in codes:
        raise subprocess.TimeoutExpired(command, timeout, stdout.encode(), stderr.encode())
    return subprocess.CompletedProcess(command, next((code for code in codes if code), 0), stdout, stderr)


# ---- the process that forks


def main() -> None:
    """Import once, then serve."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what packages print while they are imported is no answer
    _import_everything()
    for line in sys.stdin:
        values = json.loads(line)
        request = Request(**{**values, "arguments": tuple(values["arguments"])})
        print(json.dumps(_run(request)), file=replies, flush=True)


def _import_everything() -> None:
    gc.disable()
    import transformers.models.llama.modeling_llama  # noqa: F401

    import dpo_dist.adapters
    import dpo_dist.cli.precomputing
    import dpo_dist.cli.training  # noqa: F401

    gc.freeze()
    gc.enable()


def _run(request: Request) -> list[int | None]:
    ranks = _rank_variables(request.num_ranks)
    pids = [_fork(request, rank, variables) for rank, variables in enumerate(ranks)]
    codes: dict[int, int | None] = {}
    deadline = time.monotonic() + request.timeout
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes and (done := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(done[1])
                if codes[pid]:
                    deadline = min(deadline, time.monotonic() + GRACE)
        client_has_gone = bool(select.select([sys.stdin], [], [], 0.01)[0])
        if client_has_gone or time.monotonic() > deadline:
            has_failed = any(codes.values())
            for pid in set(pids) - codes.keys():
                _kill(pid)
                os.waitpid(pid, 0)
                codes[pid] = -signal.SIGKILL if has_failed else None
    for pid in pids:
        _kill(pid)  # what a rank has started
    return [codes[pid] for pid in pids]


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _rank_variables(num_ranks: int) -> list[dict[str, str]]:
    """What torchrun sets; nothing for a run of one process without a launcher."""
    if num_ranks == 1:
        return [{}]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GROUP_RANK": "0"}
    common |= {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)]


def _fork(request: Request, rank: int, variables: Mapping[str, str]) -> int:
    pid = os.fork()
    if pid:
        with contextlib.suppress(OSError):  # the child may have done so already
            os.setpgid(pid, pid)
        return pid
    code = 1
    try:
        os.setpgid(0, 0)
        _become_rank(request, rank, variables)
        runpy.run_module(request.module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _become_rank(request: Request, rank: int, variables: Mapping[str, str]) -> None:
    """Everything that a new process would have of its own."""
    for number, name, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, f"{request.logs}/stdout{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND),
        (2, f"{request.logs}/stderr{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND),
    ):
        descriptor = os.open(name, flags)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update({**request.environment, **variables})
    os.chdir(request.cwd)
    sys.argv = [request.module, *request.arguments]
    random.seed()


if __name__ == "__main__":
    main()
