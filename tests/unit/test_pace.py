"""What a step's time goes to, what the devices could do, and what is made of it."""

import gzip
import json
import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_dist import pace
from dpo_dist.pace import PART_NAMES, TIMES, Advice, Pace, Stopwatch, peak_flops
from dpo_dist.packing import CostModel, ExampleSize, StepPlan
from dpo_dist.phases import Place, listening, reach
from dpo_dist.profiling import Communication, StepProfiler, communication_in

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# Phase -> seconds until the next one. Evaluation, and what completes a checkpoint, have phases of their own.
STEP = {"step": 1.0, "reference": 2.0, "data": 4.0, "forward": 8.0, "backward": 16.0, "update": 32.0, "agree": 64.0}
BETWEEN = {"numbers": 128.0, "reference": 256.0, "forward": 512.0, "save": 1024.0}
SPENT = {"data": 5.0, "reference": 2.0, "forward": 8.0, "backward": 16.0, "update": 32.0, "agree": 64.0}
NOTHING = dict.fromkeys(PART_NAMES, 0.0)


class Clock:
    """Of the host, and of a GPU whose events are known only to who waits for them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.done_until = 0.0, -1.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(self))

    def walk(self, stopwatch: Stopwatch, phases: dict[str, float], step: int = 1) -> None:
        for phase, seconds in phases.items():
            stopwatch(Place(step, phase, 0.0, 0))
            self.now += seconds


class Event:
    """As `torch.cuda.Event`: refuses to tell the time of what nobody has waited for."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.at = clock, -1.0

    def record(self) -> None:
        self.at = self.clock.now

    def synchronize(self) -> None:
        self.clock.done_until = self.at

    def elapsed_time(self, end: "Event") -> float:
        assert 0.0 <= self.at <= end.at <= self.clock.done_until
        return (end.at - self.at) * 1e3  # milliseconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


# ---- stopwatch


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_phases_of_steps_are_timed_and_no_others(clock: Clock, device: torch.device) -> None:
    stopwatch = Stopwatch(device)
    clock.walk(stopwatch, BETWEEN)  # an evaluation before the first step
    clock.walk(stopwatch, STEP)
    assert stopwatch.read() == NOTHING, "a step that is not over"
    clock.walk(stopwatch, BETWEEN)
    assert stopwatch.read() == SPENT
    assert stopwatch.read() == NOTHING
    for step in (2, 3):  # a line for several steps
        clock.walk(stopwatch, STEP, step)
        clock.walk(stopwatch, BETWEEN, step)
    assert stopwatch.read() == {part: 2 * seconds for part, seconds in SPENT.items()}


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_several_micro_batches_and_steps_add_up(clock: Clock, device: torch.device) -> None:
    stopwatch = Stopwatch(device)
    for step in (1, 2):
        clock.walk(stopwatch, {"step": 1.0, "data": 1.0}, step)
        for _ in range(3):
            clock.walk(stopwatch, {"forward": 2.0, "backward": 4.0}, step)
        clock.walk(stopwatch, {"update": 1.0, "agree": 0.5, "numbers": 9.0}, step)
        clock.walk(stopwatch, {"evaluation": 7.0, "reference": 7.0, "forward": 7.0}, step)
    assert stopwatch.read() == {**NOTHING, "data": 4.0, "forward": 12.0, "backward": 24.0, "update": 2.0, "agree": 1.0}
    assert not stopwatch._marks


def test_a_checkpoint_that_is_completed_within_a_step_is_no_part_of_it(clock: Clock) -> None:
    stopwatch = Stopwatch(CPU)
    clock.walk(stopwatch, {"step": 1.0, "agree": 2.0, "commit": 100.0, "saved": 100.0, "numbers": 1.0})
    assert stopwatch.read() == {**NOTHING, "data": 1.0, "agree": 2.0}


def test_a_step_that_came_to_no_end_is_not_counted(clock: Clock) -> None:
    stopwatch = Stopwatch(CPU)
    clock.walk(stopwatch, {"step": 1.0, "forward": 100.0})
    clock.walk(stopwatch, {"step": 1.0, "numbers": 1.0})
    assert stopwatch.read() == {**NOTHING, "data": 1.0}


# ---- pace

COST = CostModel(per_token=10.0)
SIZES = [ExampleSize(3, (2,), ())]  # 4 tokens: 40 operations forward, 120 with backward
PLAN = StepPlan(0, (0,), (((0,),), ((),)), (((0,),), ((),)), 1.0, 2.0, 1.0, 1)
ADVICE = Advice(recomputed=(0, 2), is_chosen=False, passes=0.0, stage=0, num_devices=2)


def pace_with(clock: Clock, reference: CostModel | None = None) -> Pace:
    return Pace(Stopwatch(CPU), 100.0, 2, COST, reference, ADVICE)


@pytest.mark.parametrize(("reference", "flops"), [(None, 120.0), (COST, 160.0), (CostModel(per_token=1.0), 124.0)])
def test_a_line_is_of_the_steps_since_the_last_one(clock: Clock, reference: CostModel | None, flops: float) -> None:
    meter = pace_with(clock, reference)
    for _ in range(2):
        clock.walk(meter.stopwatch, STEP | {"numbers": 1.0})
        meter.add(PLAN, SIZES, pairs=3, tokens=4)
    line = meter.line(seconds=256.0)
    assert line.pop("mfu") == pytest.approx(2 * flops / (256.0 * 100.0 * 2))
    assert line.pop("pairs_per_second") == 6 / 256 and line.pop("tokens_per_second") == 8 / 256
    assert line.pop("time/step") == 128.0
    assert line == {f"time/{part}": seconds for part, seconds in SPENT.items()} and set(line) == set(TIMES)
    clock.walk(meter.stopwatch, {"step": 7.0, "numbers": 1.0})
    meter.add(PLAN, SIZES, pairs=0, tokens=4)
    line = meter.line(seconds=8.0)
    assert "pairs_per_second" not in line and line["tokens_per_second"] == 0.5
    assert line["time/data"] == 7.0 and line["time/agree"] == 0.0 and line["time/step"] == 8.0
    assert line["mfu"] == pytest.approx(flops / (8.0 * 100.0 * 2))


def test_a_peak_below_what_steps_have_done_was_none(clock: Clock) -> None:
    """It was measured while the machine did other work: `mfu` was 254 % once."""
    meter = pace_with(clock)
    for seconds, expected in ((0.1, 1.0), (0.2, 0.5)):
        clock.walk(meter.stopwatch, STEP | {"numbers": 1.0})
        meter.add(PLAN, SIZES, 1, 4)
        assert meter.line(seconds)["mfu"] == pytest.approx(expected)


def test_the_verdict_is_of_all_steps_with_those_that_no_line_has(clock: Clock) -> None:
    meter = pace_with(clock)
    assert meter.verdict() == "", "no step was made"
    clock.walk(meter.stopwatch, {"step": 1.0, "forward": 2.0, "backward": 6.0, "numbers": 1.0})
    meter.add(PLAN, SIZES, 1, 4)
    meter.line(10.0)
    clock.walk(meter.stopwatch, {"step": 0.0, "forward": 1.0, "numbers": 1.0})
    meter.add(PLAN, SIZES, 1, 4)
    told = "time of a step: backward 60%, forward 30%, data 10%; mfu 12%. Nothing waits: it is the model's own products"
    assert meter.verdict() == told
    assert meter.verdict() == told


def test_the_verdict_knows_the_plans_of_all_steps(clock: Clock) -> None:
    meter = pace_with(clock)
    clock.walk(meter.stopwatch, {"step": 1.0, "numbers": 1.0, "forward": 1.0})
    for idle, slots in ((0.1, 1), (0.2, 4)):
        bins = (((0,),) * slots, ((),) * slots)
        meter.add(replace(PLAN, micro_batches=bins, idle=idle), SIZES, 1, 4)
        clock.walk(meter.stopwatch, {"step": 0.0, "forward": 9.0, "numbers": 1.0})
    assert "examples, 15% of their time" in meter.verdict()
    meter.advice = replace(ADVICE, stage=3)
    meter._all_idle = 0.0
    assert "for each of 2.5 micro-batches" in meter.verdict()


# ---- advice


@pytest.mark.parametrize(
    ("shares", "settings", "told"),
    [
        ({"data": 0.2, "agree": 0.5}, {}, "The device waits for micro-batches: give each rank more CPU cores"),
        ({"reference": 0.3}, {"passes": 3.0, "idle": 0.2}, "wait for each other's examples, 20% of their time: over a"),
        ({"agree": 0.5}, {"idle": 0.09}, "Nothing waits"),
        ({"reference": 0.3, "update": 0.3}, {"passes": 3.0}, "The reference is computed for the same examples again: "),
        ({"reference": 0.3}, {"passes": 1.0}, "Nothing waits"),
        ({"update": 0.3}, {"recomputed": (2, 2)}, "Updates are dear: a larger train.examples_per_step"),
        (
            {},
            {"recomputed": (2, 2), "is_chosen": True, "stage": 3},
            "Activations are recomputed in 2 of 2 layers: model.gradient_checkpointing=auto",
        ),
        ({}, {"recomputed": (1, 2), "stage": 3}, "recomputed in 1 of 2 layers: a smaller packing.max_tokens"),
        ({}, {"stage": 3, "slots": 2.5}, "gathered for each of 2.5 micro-batches: a larger packing.max_tokens"),
        ({}, {"stage": 3, "slots": 1.0}, "gathered for a single micro-batch: a larger train.examples_per_step"),
        ({}, {"stage": 3, "num_devices": 1}, "Nothing waits"),
    ],
)
def test_advice(shares: dict[str, float], settings: dict[str, Any], told: str) -> None:
    own = {name: value for name, value in settings.items() if name in vars(ADVICE)}
    advice, plan = Advice(**{**vars(ADVICE), **own}), [settings.get(name, 0.0) for name in ("idle", "slots")]
    assert told in advice.of(NOTHING | shares, *plan)


# ---- peak


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 990),
        ("NVIDIA H20", 148),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA L4", 121),
        ("NVIDIA GB200", 2500),
        ("NVIDIA B200", 2250),
        ("AMD Instinct MI300X", 1307),
    ],
)
def test_a_data_sheet(monkeypatch: pytest.MonkeyPatch, name: str, teraflops: int) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(CUDA, torch.bfloat16) == peak_flops(CUDA, torch.float16) == teraflops * 1e12


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("NVIDIA A10", torch.bfloat16), ("NVIDIA H2000", torch.bfloat16), ("NVIDIA H100 PCIe", torch.float32)],
)
def test_what_no_data_sheet_is_known_of_is_measured(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype
) -> None:
    """On a GPU that is played by the CPU: of a name that only begins alike, and in float32."""

    def on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kinds: function(*args, **{k: v for k, v in kinds.items() if k != "device"})

    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monkeypatch.setattr(torch, "Generator", lambda device, make=torch.Generator: make())
    monkeypatch.setattr(torch, "rand", on_cpu(torch.rand))
    monkeypatch.setattr(pace, "_SIDES", {"cuda": 64})
    assert 1e6 < peak_flops(CUDA, dtype) < 1e13
    assert len(waited) > 1, "or the time until a product is asked for would be taken"


def test_measuring_draws_no_random_numbers_of_the_run() -> None:
    before = torch.get_rng_state()
    assert 1e8 < peak_flops(CPU, torch.float32) < 1e14
    assert torch.get_rng_state().equal(before)


# ---- traces


def walk_recorded(profiler: StepProfiler, *phases: tuple[str, int]) -> None:
    with ExitStack() as stack:
        stack.enter_context(listening(profiler.begin))
        stack.enter_context(listening(profiler.end))
        for phase, step in phases:
            reach(phase, step)
            torch.ones(3).cumsum(0)


def test_a_trace_is_of_its_step_alone(tmp_path: Path) -> None:
    profiler = StepProfiler(tmp_path / "profile", [2], CPU)
    walk_recorded(profiler, *((phase, step) for step in (1, 2, 3) for phase in ("step", "forward", "numbers")))
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == "step-000002.json.gz"
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert sum(event.get("name") == "aten::cumsum" for event in events) == 2
    assert communication_in(events).told(1.0) == ""


@pytest.mark.parametrize("written", ["", "no gzip", "no JSON"])
def test_a_trace_that_cannot_be_read_again_ends_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    content = gzip.compress(b'{"traceEvents": [{"name": "\\x"}]}') if written == "no JSON" else written.encode()
    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", lambda _, path: Path(path).write_bytes(content))
    caplog.set_level(logging.INFO)
    walk_recorded(StepProfiler(tmp_path / "profile", [1], CPU), ("step", 1), ("numbers", 1))
    assert "step-000001.json.gz (what it says of communication cannot be read: " in caplog.text


def event(kind: str, name: str, begin: float, end: float) -> dict[str, object]:
    """As a trace has it: microseconds; here given in seconds."""
    return {"ph": "X", "cat": kind, "name": name, "ts": begin * 1e6, "dur": (end - begin) * 1e6}


GATHER = "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)"


@pytest.mark.parametrize(
    ("events", "seconds", "exposed"),
    [
        ([event("kernel", "gemm", 0, 3)], 0, 0),
        ([event("kernel", "gemm", 0, 3), event("kernel", GATHER, 1, 2)], 1, 0),  # behind a product
        ([event("kernel", "gemm", 0, 3), event("kernel", GATHER, 2, 5)], 3, 2),  # the product ends first
        ([event("kernel", GATHER, 2, 5), event("kernel", "gemm", 3, 4)], 3, 2),  # before and after it
        ([event("kernel", GATHER, 0, 2), event("kernel", GATHER, 1, 3), event("kernel", "gemm", 9, 10)], 3, 3),
        # The host's operations, and the same collective's notes, are no work of a GPU.
        ([event("kernel", GATHER, 0, 2), event("cpu_op", "aten::mm", 0, 9)], 2, 2),
        ([event("kernel", GATHER, 0, 2), event("gpu_user_annotation", "nccl:_all_gather_base", 0, 9)], 2, 2),
        ([event("kernel", GATHER, 0, 2), event("user_annotation", "gloo:all_reduce", 3, 4)], 2, 2),
        # Without a GPU. What autograd notes around operations is also there while it waits in a hook.
        ([event("user_annotation", "gloo:all_gather", 0, 4), event("cpu_op", "aten::mm", 1, 2)], 4, 3),
        ([event("user_annotation", "gloo:all_gather", 0, 4), event("cpu_op", "PreBackwardFunction", 0, 9)], 4, 4),
        ([event("cpu_op", "aten::mm", 0, 1), {"ph": "M", "name": "process_name"}], 0, 0),
    ],
)
def test_collectives_count_once_and_what_is_computed_beside_them_hides_them(
    events: list[dict], seconds: float, exposed: float
) -> None:
    found = communication_in(reversed(events))
    assert (found.seconds, found.exposed) == pytest.approx((seconds, exposed))


def test_communication_is_told_in_seconds_and_shares_of_the_step() -> None:
    assert Communication(0.0, 0.0).told(2.0) == ""
    assert Communication(1.0, 0.5).told(4.0) == (
        ": of its 4 s collectives took 1 (25%), 0.5 of them (12%) while nothing was computed"
    )


def test_a_step_without_an_end_leaves_no_profiler_running(tmp_path: Path) -> None:
    for _ in range(2):  # a second one could not start beside the first
        profiler = StepProfiler(tmp_path / "profile", [1], CPU)
        walk_recorded(profiler, ("step", 1), ("forward", 1))
        assert torch.autograd._profiler_enabled()
        assert profiler.stop() is not None
        assert not torch.autograd._profiler_enabled()
        assert profiler.stop() is None
    assert not (tmp_path / "profile").exists()


def test_a_trace_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "profile").write_text("in the way")
    walk_recorded(StepProfiler(tmp_path / "profile", [1], CPU), ("step", 1), ("numbers", 1))
    assert "the trace of step 1 is not written" in caplog.text
