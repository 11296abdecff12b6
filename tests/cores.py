"""One machine for two pytest workers: a launch of several ranks has it for itself, everything else shares it.

Ranks wait for each other actively: beside other work they take many times as long. So every test holds the machine
shared, and gives that up for a launch of several ranks, which holds it alone. Without pytest-xdist there is nobody to
wait for.
"""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class _Machine:
    """A lock that many share or one has alone; who wants it alone comes next."""

    def __init__(self, name: str) -> None:
        folder = Path(tempfile.gettempdir())
        self._lock, self._gate = (
            os.open(folder / f"{name}.{kind}", os.O_RDWR | os.O_CREAT) for kind in ("lock", "gate")
        )

    def _take(self, kind: int) -> None:
        fcntl.flock(self._gate, fcntl.LOCK_EX)
        fcntl.flock(self._lock, kind)
        fcntl.flock(self._gate, fcntl.LOCK_UN)

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Inside, no other worker launches several ranks."""
        self._take(fcntl.LOCK_SH)
        try:
            yield
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside `shared`: the other workers wait."""
        fcntl.flock(self._lock, fcntl.LOCK_UN)
        self._take(fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_SH)  # not by way of the gate, which may be held by one who waits for us


_RUN = os.environ.get("PYTEST_XDIST_TESTRUNUID")
_MACHINE = _Machine(f"dpo_dist_tests_{_RUN}") if _RUN else None


@contextmanager
def shared() -> Iterator[None]:
    """Inside, no other worker launches several ranks."""
    if _MACHINE is None:
        yield
    else:
        with _MACHINE.shared():
            yield


@contextmanager
def alone(num_ranks: int) -> Iterator[None]:
    """Inside, several ranks have the machine for themselves; one rank shares it."""
    if _MACHINE is None or num_ranks == 1:
        yield
    else:
        with _MACHINE.alone():
            yield
