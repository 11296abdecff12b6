"""What is said where other ranks do not answer."""

import os
import threading
from collections.abc import Callable
from types import TracebackType

import torch.distributed as dist

from dpo_dist.cli.doctor.findings import Finding
from dpo_dist.errors import DpoDistError
from dpo_dist.peers import is_peer_lost

SECTION = "ranks"
GRACE = 15.0  # seconds that gloo has to say by itself that nobody answers
# Of these findings a problem keeps a rank from meeting the others at all.
_ENTRANCE = frozenset({"GPUs for ranks", "launcher", "MASTER_ADDR", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"})


def obstacle(findings: list[Finding]) -> Finding | None:
    """Why this rank need not even try to meet the others, if it need not."""
    names = [one.name for one in findings if one.status == "problem" and one.name in _ENTRANCE]
    if not names:
        return None
    text = f"the ranks have not met: {', '.join(names)} must be right first"
    return Finding(SECTION, "meeting", text, "problem", "see above")


class Waiting:
    """Ends this process where a stage takes too long, for NCCL waits for ever or ends a process without a word."""

    def __init__(self, seconds: int, ddp_timeout: int | None, leave: Callable[[Finding], None]) -> None:
        """Wait for the first stage.

        Args:
            seconds: that a stage may take.
            ddp_timeout: seconds that the run would wait; None without a configuration.
            leave: told why, in another thread, before the process ends with exit code 2.
        """
        self._seconds, self._leave, self._stage = seconds, leave, "starting"
        self._of_run = f"parallel.ddp_timeout={ddp_timeout}" if ddp_timeout else "parallel.ddp_timeout"
        self._timer: threading.Timer | None = None

    def stage(self, what: str) -> None:
        """The next stage begins; it may take as long again."""
        self._stop()
        self._stage = what
        self._timer = threading.Timer(self._seconds + GRACE, self._end)
        self._timer.daemon = True
        self._timer.start()

    def __enter__(self) -> "Waiting":
        self.stage("finding each other")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stop()

    def explain(self, error: Exception) -> Finding | None:
        """The problem that an error of a collective stands for; None if it is a fault of this program."""
        if isinstance(error, DpoDistError) and not is_peer_lost(error):
            return Finding(SECTION, "meeting", str(error), "problem", "as the message says; then start all ranks again")
        if not is_peer_lost(error) and not isinstance(error, dist.DistError):
            return None
        while error.__cause__ is not None and isinstance(error.__cause__, Exception):
            error = error.__cause__
        return self._lost(f" ({next(iter(str(error).strip().splitlines()), type(error).__name__)})")

    def _lost(self, detail: str = "") -> Finding:
        text = f"another rank is gone, or did not answer within {self._seconds} seconds (--timeout)"
        return Finding(
            SECTION,
            "meeting",
            f"{text} while {self._stage}{detail}",
            "problem",
            "look whether every rank has started, and whether the machines reach each other (interfaces, firewall); "
            f"give a longer --timeout if they are only slow: a run itself waits {self._of_run} seconds",
        )

    def _end(self) -> None:
        try:
            self._leave(self._lost())
        finally:
            os._exit(2)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
