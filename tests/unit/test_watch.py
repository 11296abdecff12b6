"""A run in which nothing moves ends, and says who does not answer."""

import json
import time
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from dpo_dist.distributed import Ranks
from dpo_dist.errors import StorageError
from dpo_dist.phases import arm, place, reach
from dpo_dist.watch import _Watch, watching


class Left(BaseException):
    pass


class Leaving:
    """Stands in for the end of the process: remembers why, and ends only the thread."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def __call__(self, text: str) -> NoReturn:
        self.said.append(text)
        raise Left(text)


def ranks(world_size: int) -> Ranks:
    return Ranks(0, world_size, 0, torch.device("cpu"))


OWN = 7  # collectives that this rank has begun, in its report


def others_report(
    folder: Path, rank: int, step: int, phase: str, count: int, waits: bool = True, begun: int = OWN
) -> None:
    (folder / "hang").mkdir(exist_ok=True)
    values = {"step": step, "phase": phase, "count": count, "waits": waits, "begun": begun}
    (folder / "hang" / f"rank-{rank:05d}.txt").write_text(json.dumps(values))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(
    ("world_size", "reports", "expected"),
    [
        (2, [], "rank 1 does not answer: stopped, or its machine is gone"),
        (4, [(2, 5, "forward", 3)], "ranks 1, 3 do not answer"),
        (2, [(1, 4, "backward", 1)], "rank 1 does not get any further than step 4, backward"),
        (3, [(1, 5, "forward", 3), (2, 5, "forward", 3, False)], "ranks 0, 2 do not get any further than step 5, for"),
        (2, [(1, 5, "forward", 3, False)], "all ranks stand at the same place: look at the network between them"),
        (2, [(1, 5, "update", 9)], "rank 0 does not get any further than step 5, forward"),
        (3, [(1, 5, "forward", 3, True, 7), (2, 5, "forward", 3, True, 6)], "rank 2 does not get any further than st"),
        (2, [(1, 5, "forward", 3, False, 8)], "rank 0 does not get any further than step 5, forward"),
    ],
)
def test_who_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world_size: int, reports: list[tuple], expected: str
) -> None:
    arm("", 0)
    monkeypatch.setattr("dpo_dist.watch.last_collectives", lambda on_gpu: (OWN, ["  7: gloo:all_reduce of [3]\n"]))
    leaving = Leaving()
    others_report(tmp_path, 7, 1, "of an earlier start", 1)
    with watching(tmp_path, ranks(world_size), 1, leaving):
        assert not (tmp_path / "hang").exists()
        reach("step", 5)
        reach("forward")
        for report in reports:
            others_report(tmp_path, *report)
        end = time.monotonic() + 20
        while not leaving.said:
            assert time.monotonic() < end
            time.sleep(0.05)
    assert "nothing has moved for parallel.ddp_timeout=1 seconds at step 5, forward: " in leaving.said[0]
    assert expected in leaving.said[0] and f"{tmp_path}/hang/rank-*.txt" in leaving.said[0]
    report = (tmp_path / "hang" / "rank-00000.txt").read_text()
    assert json.loads(report.splitlines()[0]) == {
        "step": 5,
        "phase": "forward",
        "count": place().count,
        "begun": OWN,
        "waits": False,
    }
    assert report.endswith("newest last:\n  7: gloo:all_reduce of [3]\n")
    assert "test_watch.py" in report and "test_who_does_not_answer" in report


def test_all_wait_for_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo_dist.watch._COLLECTIVES", ("test_watch.py",))
    leaving = Leaving()
    with pytest.raises(Left), watching(tmp_path, ranks(1), 60, leaving):
        later = time.monotonic() + 59
        monkeypatch.setattr("dpo_dist.watch.time.monotonic", lambda: later)
        raise RuntimeError("Timed out waiting 60000ms for recv operation to complete")
    assert "all ranks stand at the same place: look at the network" in leaving.said[0]
    assert json.loads((tmp_path / "hang" / "rank-00000.txt").read_text().splitlines()[0])["waits"] is True


def test_who_gets_on_is_left_alone(tmp_path: Path) -> None:
    leaving = Leaving()
    with watching(tmp_path, ranks(1), 1, leaving):
        for _ in range(15):
            reach("forward")
            time.sleep(0.1)
    assert not leaving.said and not (tmp_path / "hang").exists()


def test_a_collective_that_runs_out_of_time_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its error would end the process before the thread has written anything."""
    leaving = Leaving()
    with pytest.raises(Left), watching(tmp_path, ranks(1), 60, leaving):
        reach("forward")
        later = time.monotonic() + 59
        monkeypatch.setattr("dpo_dist.watch.time.monotonic", lambda: later)
        raise RuntimeError("Timed out waiting 60000ms for recv operation to complete")
    assert "nothing has moved" in leaving.said[0]


@pytest.mark.parametrize("late", [0, 59])
def test_another_error_is_raised_at_once(tmp_path: Path, late: int, monkeypatch: pytest.MonkeyPatch) -> None:
    leaving = Leaving()
    with pytest.raises(StorageError, match="another"), watching(tmp_path, ranks(2), 60, leaving):
        later = time.monotonic() + late
        monkeypatch.setattr("dpo_dist.watch.time.monotonic", lambda: later)
        raise StorageError("another")
    assert not leaving.said


def test_who_still_moves_reports_when_another_gives_up(tmp_path: Path) -> None:
    leaving = Leaving()
    with watching(tmp_path, ranks(2), 5, leaving):
        others_report(tmp_path, 1, 4, "backward", 1)
        end = time.monotonic() + 20
        while not (tmp_path / "hang" / "rank-00000.txt").exists():
            assert time.monotonic() < end
            reach("forward")
            time.sleep(0.05)
    assert not leaving.said


def test_time_in_which_the_process_was_suspended_does_not_count(tmp_path: Path) -> None:
    leaving = Leaving()
    watch = _Watch(tmp_path / "hang", ranks(1), 600, leaving)
    reach("forward")
    clock = [time.monotonic(), time.monotonic() + 3600]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch.over, "wait", lambda seconds: clock.pop(0) and False)
        patch.setattr("dpo_dist.watch.time.monotonic", lambda: clock[0])
        assert watch.idle() < 1
        assert not watch._waited()
        assert watch.idle() < 1
    assert watch._awake_since > 0
