"""Where a process stands, and faults that tests plant."""

import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from dpo_dist import phases
from dpo_dist.errors import ConfigError
from dpo_dist.phases import Place, arm, inject, listening, place, reach


@pytest.fixture(autouse=True)
def begin_anew() -> Iterator[None]:
    arm("", 0)
    yield
    arm("", 0)


def test_a_process_knows_what_it_reached() -> None:
    assert (place().step, place().phase, place().count) == (0, "start", 0)
    before = time.monotonic()
    assert reach("step", 7) is False and reach("forward") is False
    assert (place().step, place().phase, place().count) == (7, "forward", 2)
    assert before <= place().since <= time.monotonic()
    assert inject("metrics") is False
    assert place().phase == "forward", "what one rank alone does is no progress of all"


def test_listeners_hear_in_their_order_and_are_removed() -> None:
    heard: list[tuple[str, int, str]] = []

    def named(name: str) -> Callable[[Place], object]:
        return lambda here: heard.append((name, here.step, here.phase))

    reach("before")
    with listening(named("a")), listening(named("b")):
        reach("step", 3)
    reach("after")
    assert heard == [("a", 3, "step"), ("b", 3, "step")]
    arm("error@0:*:backward", 0)
    with pytest.raises(RuntimeError, match="planted"), listening(named("c")):
        reach("backward")
    reach("after")
    assert heard[2:] == [("c", 0, "backward")], "what is reached is heard before the fault strikes; then nothing"
    assert not phases._listeners


@pytest.mark.parametrize(
    ("fault", "strikes"),
    [
        ("nan@0:2:backward", True),
        ("nan@*:*:backward", True),
        ("nan@1:2:backward", False),
        ("nan@0:3:backward", False),
        ("nan@0:2:forward", False),
        ("kill@0:3:backward,nan@0:2:backward", True),
    ],
)
def test_a_fault_strikes_where_it_was_planted(fault: str, strikes: bool) -> None:
    arm(fault, 0)
    reach("step", 2)
    assert reach("backward") is strikes
    assert reach("backward") is strikes, "again"


def test_a_fault_can_strike_so_many_times() -> None:
    arm("full=2@0:*:metrics", 0)
    for _ in range(2):
        with pytest.raises(OSError, match="No space left on device"):
            inject("metrics")
    assert inject("metrics") is False


@pytest.mark.parametrize(("kind", "error"), [("error", RuntimeError), ("memory", MemoryError)])
def test_errors(kind: str, error: type[Exception]) -> None:
    arm(f"{kind}@0:0:load", 0)
    with pytest.raises(error):
        reach("load")


def test_signals_sleep_and_hanging(monkeypatch: pytest.MonkeyPatch) -> None:
    sent, slept = [], []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    monkeypatch.setattr(time, "sleep", lambda seconds: slept.append(seconds) or 1 / (len(slept) < 3))
    arm("kill@0:*:a,stop@0:*:b,term@0:*:c,slow=2.5@0:*:d,hang@0:*:e", 0)
    for phase in "abcd":
        reach(phase)
    own = os.getpid()
    assert sent == [(own, signal.SIGKILL), (own, signal.SIGSTOP), (own, signal.SIGTERM)] and slept == [2.5]
    with pytest.raises(ZeroDivisionError):
        reach("e")
    assert slept == [2.5, 60, 60]


@pytest.mark.parametrize("text", ["kill", "kill@0", "kill@0:1", "maim@0:1:save", "kill@x:1:save", "kill@0:1:"])
def test_a_fault_that_cannot_be_read(text: str) -> None:
    with pytest.raises(ConfigError, match="write kind@rank:step:phase"):
        arm(text, 0)


def test_nothing_is_planted_unless_tests_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from dpo_dist.cli import app

    monkeypatch.setenv("DPO_DIST_FAULT", "nan@0:*:backward")
    CliRunner().invoke(app, ["check", "no.yaml"])
    assert not phases._faults
    monkeypatch.setenv("DPO_DIST_TESTING", "1")
    CliRunner().invoke(app, ["check", "no.yaml"])
    assert phases._faults
