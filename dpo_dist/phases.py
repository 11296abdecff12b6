"""Where a run stands: what a watchdog looks at, and where tests break it.

A process reaches one phase after the other (`step`, `reference`, `forward`, `backward`, `update`, `evaluation`, `save`,
`export`, ...). `arm` plants faults, for tests alone: kill@1:3:save kills rank 1 when it begins to save after step 3.

| kind | what happens there |
|---|---|
| `kill`, `stop`, `term` | SIGKILL, SIGSTOP or SIGTERM to this process |
| `hang`, `slow=SECONDS` | it sleeps, for ever or so long |
| `nan` | the number that is computed there is not finite |
| `full`, `error`, `memory` | the disk is full; an unexpected error; no memory is left |

`full=2` and others with a number strike so many times, and then no more.
"""

import errno
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from dpo_dist.errors import ConfigError

_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}
_ERRORS: dict[str, Callable[[], Exception]] = {
    "full": lambda: OSError(errno.ENOSPC, "No space left on device (planted)"),
    "error": lambda: RuntimeError("planted"),
    "memory": lambda: MemoryError("planted"),
}
_FAULT = re.compile(r"(?P<kind>\w+)(=(?P<number>[\d.]+))?@(?P<rank>\*|\d+):(?P<step>\*|\d+):(?P<phase>[\w.]+)")
_KINDS = (*_SIGNALS, *_ERRORS, "hang", "slow", "nan")


@dataclass(frozen=True)
class Place:
    """A phase that was reached."""

    step: int
    """The update that is being made, counted from 1; of what follows an update, that update."""
    phase: str
    since: float
    """`time.monotonic()` when it was reached."""
    count: int
    """Phases that this process has reached; equal on all ranks that stand at the same place."""


@dataclass
class _Fault:
    kind: str
    number: float  # seconds, or how often; 0: always
    step: int | None  # None: any
    phase: str


_place = Place(0, "start", time.monotonic(), 0)
_faults: list[_Fault] = []
_listeners: list[Callable[[Place], object]] = []


def place() -> Place:
    """What this process has reached last."""
    return _place


@contextmanager
def listening(listener: Callable[[Place], object]) -> Iterator[None]:
    """Inside, `listener` is called with every place that this process reaches."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def reach(phase: str, step: int | None = None) -> bool:
    """Note that this process gets to a phase now. Every rank gets to the same ones, in the same order.

    Args:
        phase: its name.
        step: of the phase and of those that follow; None: as before.
    Returns:
        Whether the number that is computed here is to be broken: False outside of tests.
    """
    global _place
    _place = Place(_place.step if step is None else step, phase, time.monotonic(), _place.count + 1)
    for listener in _listeners:
        listener(_place)
    return inject(phase)


def inject(phase: str) -> bool:
    """A place where a fault can be planted, and which ranks may reach alone; returns as `reach`."""
    return any(_strike(fault) for fault in list(_faults) if fault.phase == phase and fault.step in (None, _place.step))


def arm(text: str, rank: int) -> None:
    """Begin anew, at no step, with these faults planted in this process.

    Args:
        text: `kind@rank:step:phase`, several of them with commas; `*` for any rank or step; empty: none.
        rank: of this process.
    Raises:
        ConfigError: it cannot be read.
    """
    global _place
    _place = Place(0, "start", time.monotonic(), 0)
    _faults.clear()
    for one in filter(None, text.split(",")):
        found = _FAULT.fullmatch(one)
        if found is None or found["kind"] not in _KINDS:
            raise ConfigError(f"DPO_DIST_FAULT={one}: write kind@rank:step:phase, with a kind of {', '.join(_KINDS)}")
        step = None if found["step"] == "*" else int(found["step"])
        if found["rank"] in ("*", str(rank)):
            _faults.append(_Fault(found["kind"], float(found["number"] or 0), step, found["phase"]))


def _strike(fault: _Fault) -> bool:
    if fault.kind == "slow":
        time.sleep(fault.number)
    elif fault.number == 1:
        _faults.remove(fault)
    fault.number -= fault.kind != "slow"  # below 0 it never gets to 1
    if fault.kind in _SIGNALS:
        os.kill(os.getpid(), _SIGNALS[fault.kind])
    if fault.kind in _ERRORS:
        raise _ERRORS[fault.kind]()
    while fault.kind == "hang":
        time.sleep(60)
    return fault.kind == "nan"
