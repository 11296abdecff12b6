"""What the next step needs is made beside this one, and is what it would have been; so are its end and its errors."""

import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from dpo_dist.ahead import Ahead
from dpo_dist.batch import MicroBatch, RankWork
from dpo_dist.batch import micro_batch as batch_file
from dpo_dist.distributed import Ranks
from dpo_dist.errors import DataError
from dpo_dist.pace import Stopwatch
from dpo_dist.packing import Packer, StepPlan
from dpo_dist.phases import Place, listening, reach
from dpo_dist.reference import NoReference
from dpo_dist.run import Run
from dpo_dist.sampler import Sampler
from dpo_dist.tokenization import TokenizedDataset
from tests.stored_rows import examples_of, save_dataset
from tests.unit.test_arrangement import assert_equal

CPU = torch.device("cpu")


class Noted:
    """Makes a step's number and the thread that it was made on; waits before a step until it is let go."""

    def __init__(self, wait_before: int = -1) -> None:
        self.made: list[int] = []
        self.wait_before, self.go = wait_before, threading.Event()

    def __call__(self, step: int) -> tuple[int, threading.Thread]:
        if step == self.wait_before:
            assert self.go.wait(30)
        self.made.append(step)
        return step, threading.current_thread()

    def until(self, step: int) -> None:
        end = time.monotonic() + 30
        while step not in self.made:
            assert time.monotonic() < end
            time.sleep(0.001)


def test_a_step_that_was_begun_is_made_beside_the_one_before() -> None:
    make, main = Noted(), threading.current_thread()
    ahead = Ahead(make, 6)
    for step in range(2, 6):
        number, thread = ahead.of(step)
        assert number == step
        assert (thread is main) == (step == 2)
        assert thread is main or thread.daemon
        for _ in range(3):  # after each micro-batch
            ahead.begin(step + 1)
    assert make.made == [2, 3, 4, 5]


def test_one_step_ahead_and_no_further() -> None:
    make = Noted()
    ahead = Ahead(make, 10)
    ahead.of(0)
    ahead.begin(1)
    make.until(1)
    ahead.begin(1)
    time.sleep(0.05)
    assert make.made == [0, 1]


def test_nothing_is_made_after_the_last_step() -> None:
    make = Noted()
    ahead = Ahead(make, 2)
    ahead.of(0)
    ahead.begin(1)
    ahead.of(1)
    ahead.begin(2)
    time.sleep(0.05)
    assert make.made == [0, 1]


def test_a_step_that_is_not_there_yet_is_waited_for() -> None:
    make = Noted(wait_before=1)
    ahead = Ahead(make, 3)
    ahead.begin(1)
    threading.Timer(0.05, make.go.set).start()
    assert ahead.of(1)[0] == 1


@pytest.mark.parametrize("error", [OSError(5, "Input/output error", "data.arrow"), DataError("a.jsonl:3: gone")])
def test_an_error_is_raised_at_the_step_that_it_belongs_to(error: Exception) -> None:
    def make(step: int) -> int:
        if step == 2:
            raise error
        return step

    ahead = Ahead(make, 5)
    ahead.begin(1)
    assert ahead.of(1) == 1
    ahead.begin(2)
    with pytest.raises(type(error)) as caught:
        ahead.of(2)
    assert caught.value is error
    assert "make" in [entry.name for entry in caught.traceback]  # where it happened


def test_an_error_of_a_step_that_nobody_comes_to_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    done = threading.Event()

    def make(step: int) -> int:
        if step == 1:
            done.set()
            raise OSError("nobody asks")
        return step

    Ahead(make, 5).begin(1)
    assert done.wait(30)
    time.sleep(0.05)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("work", ["torch.arange(100_000).sort()", "time.sleep(1000)"])
def test_a_process_may_end_while_the_thread_works(work: str) -> None:
    """By itself, with an interpreter that is taken apart; a disk that hangs is not waited for."""
    text = f"""
import time
import torch
from dpo_dist.ahead import Ahead

def make(step):
    end = time.monotonic() + 1.0
    while step and time.monotonic() < end:
        {work}

Ahead(make, 5).begin(1)
print("over", time.monotonic())
"""
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False, timeout=120)
    ended = time.monotonic()  # of the same clock
    assert (done.returncode, done.stderr) == (0, "")
    assert ended - float(done.stdout.split()[1]) < 15


# ---- the time of a step


def test_only_what_is_waited_for_is_time_for_data(monkeypatch: pytest.MonkeyPatch) -> None:
    now, go = [0.0], {1: threading.Event(), 2: threading.Event()}
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    noted, stopwatch = Noted(), Stopwatch(CPU)

    def make(step: int) -> object:
        assert step == 0 or go[step].wait(30)
        now[0] += 100.0
        return noted(step)

    ahead, spent = Ahead(make, 3), []
    with listening(stopwatch):
        for step in range(3):
            reach("step", step + 1)
            if step == 2:
                go[2].set()
            ahead.of(step)
            reach("forward")
            ahead.begin(step + 1)
            if step == 0:
                go[1].set()
                noted.until(1)  # the device is busy for as long
            reach("numbers")
            spent.append(stopwatch.read())
    assert [(one["data"], one["forward"]) for one in spent] == [(100.0, 100.0), (0.0, 0.0), (100.0, 0.0)]


# ---- a run's steps


class Stub(SimpleNamespace):
    """As much of a run as its shares are made of."""

    def plan(self, step: int) -> StepPlan:
        return Run.plan(cast(Any, self), step)

    def share(self, step: int) -> tuple[StepPlan, RankWork]:
        return Run.share(cast(Any, self), step)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TokenizedDataset:
    return save_dataset(tmp_path_factory.mktemp("ahead") / "data", examples_of(11, seed=3))


def _run(dataset: TokenizedDataset, **changed: Any) -> Stub:
    settings: dict[str, Any] = {
        "rank": 0, "world_size": 1, "share": True, "max_tokens": 20, "ld_alpha": None, "per_microbatch": False,
        "reference": object(), "device": CPU,
    }  # fmt: skip
    settings |= changed
    return Stub(
        sampler=Sampler(len(dataset), 4, seed=5, shuffle=True),
        packer=Packer(settings["world_size"], settings["max_tokens"], 3 * settings["max_tokens"], settings["share"]),
        dataset=dataset,
        ranks=Ranks(settings["rank"], settings["world_size"], 0, settings["device"]),
        reference=settings["reference"],
        config=SimpleNamespace(
            loss=SimpleNamespace(ld_alpha=settings["ld_alpha"]),
            reference=SimpleNamespace(per_microbatch=settings["per_microbatch"]),
        ),
    )


KINDS: list[dict[str, Any]] = [
    {},
    {"share": False, "max_tokens": 40},
    {"world_size": 3, "rank": 2},  # with fillers, where a step is short
    {"ld_alpha": 0.25},
    {"per_microbatch": True},
    {"reference": NoReference(CPU)},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("first", [0, 2])
def test_a_step_made_ahead_is_the_step_made_at_its_time(
    dataset: TokenizedDataset, kind: dict[str, Any], first: int
) -> None:
    run, reached = _run(dataset, **kind), list[Place]()
    ahead = Ahead(run.share, 9)  # three epochs
    for step in range(first, 9):
        with listening(reached.append):
            plan, work = ahead.of(step)
            ahead.begin(step + 1)
        rank, packer = run.ranks.rank, run.packer
        assert plan == run.plan(step)
        expected = RankWork(plan, rank, dataset, packer.share_prompts, run.config.loss.ld_alpha)
        assert (work.rows, work.num_completions) == (expected.rows, expected.num_completions)
        for ask in (RankWork.micro_batches, RankWork.reference_bins):
            for found, wanted in zip(ask(work), ask(expected), strict=True):
                assert_equal(found, wanted)
    assert reached == []  # phases belong to the steps themselves


def test_what_is_asked_for_is_there_already(dataset: TokenizedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    built, build = list[object](), RankWork.build
    monkeypatch.setattr(RankWork, "build", lambda work, *rest: built.append(1) or build(work, *rest))
    reads_no_bins: tuple[dict[str, Any], ...] = ({"per_microbatch": True}, {"reference": NoReference(CPU)})
    for kind in ({}, *reads_no_bins):
        built.clear()
        plan, work = _run(dataset, **kind).share(0)
        num_batches, num_bins = len(plan.micro_batches[0]), len(plan.reference_bins[0])
        assert num_batches > num_bins > 0
        wanted = num_batches + (0 if kind else num_bins)
        assert len(built) == wanted
        assert len(work.micro_batches()) == len(work.micro_batches()) == num_batches
        if not kind:
            assert len(work.reference_bins()) == num_bins
        assert len(built) == wanted


def test_what_layers_keep_with_a_micro_batch_is_not_kept_for_the_next_asker(dataset: TokenizedDataset) -> None:
    _, work = _run(dataset).share(0)
    first = work.micro_batches()[0]
    first.layout.masks[(1, 1, None)] = torch.ones(1, 1)
    first.layout.reached.add(1)
    again = work.micro_batches()[0]
    assert (again.layout.masks, again.layout.reached) == ({}, set())
    assert again.input_ids_T is first.input_ids_T


# ---- pinned memory, of which there is none here


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Every piece of memory that was to be pinned."""
    pieces: list[torch.Tensor] = []
    stock = torch.zeros

    def zeros(*size: Any, pin_memory: bool = False, **settings: Any) -> torch.Tensor:
        found = stock(*size, **settings)
        pieces.extend([found] if pin_memory else [])
        return found

    monkeypatch.setattr(batch_file.torch, "zeros", zeros)
    return pieces


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_on_a_gpu_a_share_lies_in_pinned_memory(
    dataset: TokenizedDataset, pinned: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    device, devices = torch.device("cuda", 3), list[tuple[object, threading.Thread]]()
    monkeypatch.setattr(torch.cuda, "set_device", lambda one: devices.append((one, threading.current_thread())))
    ahead = Ahead(_run(dataset, device=device).share, 2)
    ahead.begin(1)
    _, work = ahead.of(1)
    plan = _run(dataset).plan(1)
    assert [one for one, _ in devices] == [device]
    assert devices[0][1] is not threading.current_thread()  # which has a device of its own
    batches = [*work.micro_batches(), *work.reference_bins()]
    assert [_address(batch.input_ids_T) for batch in batches] == list(map(_address, pinned))
    expected = RankWork(plan, 0, dataset, share_prompts=True)
    for found, wanted in zip(batches, [*expected.micro_batches(), *expected.reference_bins()], strict=True):
        assert_equal(found, wanted)


def test_from_pinned_memory_nothing_is_copied_on_the_host_again(
    dataset: TokenizedDataset, pinned: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = RankWork(_run(dataset).plan(0), 0, dataset, share_prompts=True).micro_batches()[0]
    once, copies, stock = batch.pinned(), list[tuple[int, bool]](), torch.Tensor.to
    assert len(pinned) == 1

    def to(tensor: torch.Tensor, device: torch.device, non_blocking: bool = False) -> torch.Tensor:
        copies.append((_address(tensor), non_blocking))
        return stock(tensor.clone(), CPU)

    monkeypatch.setattr(torch.Tensor, "to", to)
    moved = once.to(torch.device("cuda", 0))
    assert copies == [(_address(pinned[0]), True)] and len(pinned) == 1
    assert_equal(moved, batch)
    assert _address(moved.input_ids_T) != _address(pinned[0])
    _as_before(batch, pinned, copies)


def _as_before(batch: MicroBatch, pinned: list[torch.Tensor], copies: list[tuple[int, bool]]) -> None:
    """One that is not yet in pinned memory gets there first, and so does one of which a part was exchanged."""
    for one in (batch, batch_file.replace(batch.pinned(), pair_weight_B=batch.pair_weight_B.clone())):
        before = len(pinned)
        assert_equal(one.to(torch.device("cuda", 0)), batch)
        assert len(pinned) == before + 1 and copies[-1] == (_address(pinned[-1]), True)
