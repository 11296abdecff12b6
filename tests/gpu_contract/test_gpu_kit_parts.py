"""What the parts of the kit make of what they measure: numbers as they were recorded, and with faults in them."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_kit.__main__ import PARTS, section
from benchmarks.gpu_kit.against_trl import BOUNDS, COMPARED_STEPS, compare, trl
from benchmarks.gpu_kit.golden import BOUNDS as GOLDEN_BOUNDS
from benchmarks.gpu_kit.golden import _distance
from benchmarks.gpu_kit.kit import LARGE, SMALL, TINY, WARM_UP_STEPS, Failed, Kit, Skipped, sizes_for
from benchmarks.gpu_kit.noise import self_check
from benchmarks.gpu_kit.page import page
from benchmarks.gpu_kit.profiling import STEP_NAME, summary
from benchmarks.gpu_kit.throughput import random_rows, run_folder, throughput
from tests.golden.trajectories import CASES

# A whole run of the kit on two cores, with TRL 1.16 installed. Ceilings, kernels and variants are of a later run,
# on one of them, and with them came the older parts' shares: their operations are a closed form.
RECORDED = Path(__file__).with_name("gpu_report.json")
KEYS = (*BOUNDS, "num_tokens")


@pytest.fixture
def report() -> dict[str, Any]:
    return json.loads(RECORDED.read_text())


@pytest.fixture
def kit(tmp_path: Path) -> Kit:
    kit = Kit(tmp_path, 1, TINY, {"gpus": []}, None)
    for folder in (kit.work, kit.log_of("x").parent, run_folder(kit, "on")):
        folder.mkdir()
    return kit


# ---- the page


def test_the_page_shows_what_is_in_the_report(report: dict[str, Any]) -> None:
    sections = report["sections"]
    assert list(sections) == ["environment", *PARTS]
    text = page(report)
    assert text.isascii() and text == page(json.loads(json.dumps(report)))
    for name, one in sections.items():
        assert f"| {name} | ok | {one['seconds']:.0f} |  |" in text and f"## {name}\n" in text
    compared = sections["trl"]["values"]
    assert f"| TRL 1.16.0 | 2 | sdpa | {compared['runs'][0]['pairs_per_second']:.3g} | " in text
    ratios = compared["pairs_per_second_over_trl"]
    assert f"prompts shared: on: {ratios['prompts shared: on']:.2f}; prompts shared: off: " in text
    assert "| 1 | 0.6931472 / 0.6931472 |" in text and " 1351 / 1351 |" in text
    longest = sections["profile"]["values"]["top"][0]
    assert f"| aten::mm | {longest['calls']} | {longest['seconds']:.3g} | {longest['share']:.1%} |" in text
    assert f"| on | {sections['throughput']['values']['prefix_sharing']['on']['num_parameters']:,} | sdpa |" in text


def test_the_page_shows_what_failed(report: dict[str, Any]) -> None:
    values = report["sections"]["trl"]["values"]
    del values["pairs_per_second_over_trl"]
    report["sections"]["trl"] |= {"status": "failed", "reason": "not the same | work"}
    report["sections"]["golden"] = {"status": "skipped", "reason": "no time left", "seconds": 0.0}
    text = page(report)
    assert "| trl | failed |" in text and "not the same / work |" in text
    assert "over TRL's fastest" not in text and "## golden" not in text


# ---- profile


def traced(*events: tuple[str, str, float, float], thread: int = 1) -> list[dict[str, Any]]:
    """Events of a trace: category, name, start and duration in microseconds."""
    return [{"ph": "X", "cat": c, "name": n, "ts": ts, "dur": dur, "tid": thread} for c, n, ts, dur in events]


def test_a_step_on_a_gpu_is_told_by_its_kernels(report: dict[str, Any]) -> None:
    events = traced(
        ("user_annotation", STEP_NAME, 1000, 100),
        ("cpu_op", "aten::mm", 1000, 90),
        ("kernel", "gemm", 1010, 20),
        ("kernel", "gemm", 1040, 20),
        ("kernel", "ncclDevKernel_AllGather_RING_LL", 1050, 30),  # 10 beside a product, 20 alone
        ("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 1085, 5),
        ("cuda_runtime", "cudaStreamSynchronize", 1090, 1),
        ("cuda_runtime", "cudaLaunchKernel", 1000, 1),
    )
    found = summary({"traceEvents": [*events, {"ph": "i", "name": "a mark"}]})
    assert found == {
        "step_seconds": 1e-4,
        "device": "gpu",
        "top": [
            {"name": "gemm", "calls": 2, "seconds": 4e-5, "share": 0.4},
            {"name": "ncclDevKernel_AllGather_RING_LL", "calls": 1, "seconds": 3e-5, "share": 0.3},
            {"name": "Memcpy DtoH (Device -> Pageable)", "calls": 1, "seconds": 5e-6, "share": 0.05},
        ],
        "busy_share": 0.65,
        "collectives": {"calls": 1, "share": 0.3, "share_with_nothing_beside": 0.2},
        "host_waits": {"cudaStreamSynchronize": 1},
        "copies": {"Memcpy DtoH (Device -> Pageable)": 1},
    }
    report["sections"]["profile"]["values"] |= found
    text = page(report)
    assert "Collectives: 1 calls, 30% of the step.\nNothing was computed beside them for 20% of the step.\n" in text
    assert "The GPU was busy for 65%.\nHost waits: cudaStreamSynchronize 1.\n" in text
    assert "| gemm | 2 | 4e-05 | 40.0% |" in text


def test_a_step_on_a_cpu_is_told_by_what_operators_do_themselves() -> None:
    events = traced(
        ("user_annotation", STEP_NAME, 0, 100),
        ("cpu_op", "aten::linear", 0, 50),
        ("cpu_op", "aten::mm", 5, 30),
        ("cpu_op", "aten::mm", 36, 10),
        ("cpu_op", "aten::linear", 50, 10),
    )
    events += traced(("user_annotation", "gloo:all_gather", 0, 20), ("cpu_op", "aten::mm", 1, 4), thread=2)
    found = summary({"traceEvents": events})
    assert {one["name"]: (one["calls"], round(one["share"], 3)) for one in found["top"]} == {
        "aten::mm": (3, 0.44),
        "aten::linear": (2, 0.2),
    }
    assert (found["device"], found["collectives"]) == (
        "cpu", {"calls": 1, "share": 0.2, "share_with_nothing_beside": 0.0},
    )  # fmt: skip


@pytest.mark.parametrize(
    "events", [[], traced(("cpu_op", "aten::mm", 0, 1)), traced(("user_annotation", STEP_NAME, 0, 1))]
)
def test_a_trace_without_the_step_is_a_failure(events: list[dict[str, Any]]) -> None:
    with pytest.raises(Failed, match="the trace holds"):
        summary({"traceEvents": events})


# ---- trl


def _sides(report: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The recorded first steps as the two runs logged them."""
    rows = report["sections"]["trl"]["values"]["runs"][0]["first_steps"]
    ours, theirs = ([{"step": row["step"]} | {key: row[key][side] for key in KEYS} for row in rows] for side in (0, 1))
    tokens = [0, *(line["num_tokens"] for line in ours)]
    return [
        line | {"tokens_unshared": line["num_tokens"] - before} for line, before in zip(ours, tokens[:-1], strict=True)
    ], theirs


def test_trl_has_done_the_same_work(report: dict[str, Any]) -> None:
    found = compare(*_sides(report))
    recorded = report["sections"]["trl"]["values"]["runs"][0]
    assert found == {key: recorded[key] for key in ("first_steps", "distance", "faults")}
    assert len(found["first_steps"]) == COMPARED_STEPS and found["faults"] == []
    assert all(found["distance"][key] < bound / 50 for key, bound in BOUNDS.items())


@pytest.mark.parametrize(
    ("key", "fault", "told"),
    [
        ("grad_norm", lambda norm: 2 * norm, "grad_norm 1.0e+00 > 2.0e-02"),  # another beta
        ("grad_norm", lambda norm: norm * 2**-0.5, "grad_norm 2.9e-01 > 2.0e-02"),  # another number of pairs in a step
        ("logps/chosen", lambda logps: logps * 40 / 41, "logps/chosen 2.4e-02 > 2.0e-03"),  # a token is not scored
        ("loss", lambda loss: math.nan, "loss nan > 1.0e-02"),
        ("num_tokens", lambda tokens: tokens - 1, "step 2: 2513 tokens, ours 2514"),
    ],
)
def test_other_work_shows(report: dict[str, Any], key: str, fault: Callable[[float], float], told: str) -> None:
    ours, theirs = _sides(report)
    theirs[1][key] = fault(theirs[1][key])
    assert compare(ours, theirs)["faults"] == [told]


def test_without_trl_it_says_so(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu_kit.against_trl.find_spec", lambda name: None)
    found = section("trl", trl, kit)
    assert (found["status"], found["reason"]) == ("skipped", "TRL is not installed; pip install trl to compare")


def test_one_size_of_trl_that_fails_leaves_the_other(
    report: dict[str, Any], kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = report["sections"]["trl"]["values"]
    outcomes: dict[int, Any] = {4: Failed("out of memory"), 2: recorded["runs"][0]}

    def measured(kit: Kit, pairs_at_once: int) -> dict[str, Any]:
        if isinstance(outcomes[pairs_at_once], Exception):
            raise outcomes[pairs_at_once]
        return copy.deepcopy(outcomes[pairs_at_once])

    monkeypatch.setattr("benchmarks.gpu_kit.against_trl.find_spec", lambda name: True)
    monkeypatch.setattr("benchmarks.gpu_kit.against_trl._ours", lambda kit: recorded["ours"])
    monkeypatch.setattr("benchmarks.gpu_kit.against_trl._measured", measured)
    kit.sizes = SMALL
    assert "was not made" in section("trl", trl, kit)["reason"]
    (run_folder(kit, "on") / "observed-0.json").touch()
    found = section("trl", trl, kit)
    assert found["status"] == "ok" and found["values"]["left_out"] == ["out of memory"]
    assert found["values"]["pairs_per_second_over_trl"] == recorded["pairs_per_second_over_trl"]
    outcomes[2]["faults"] = ["grad_norm 1.0e+00 > 2.0e-02"]
    wrong = section("trl", trl, kit)
    assert wrong["status"] == "failed" and "2 pairs at once: grad_norm" in wrong["reason"]
    assert "pairs_per_second_over_trl" not in wrong["values"]
    outcomes[2] = Skipped("no time left")
    assert section("trl", trl, kit)["reason"] == "out of memory; no time left"
    outcomes[4] = Skipped("no time left")
    assert section("trl", trl, kit)["status"] == "skipped"


# ---- the others


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("key", ["loss", "rewards/margins"])
def test_a_nan_is_the_largest_distance(step: int, key: str) -> None:
    lines = [dict.fromkeys(GOLDEN_BOUNDS, 1.0) for _ in range(2)]
    assert set(_distance(lines, lines).values()) == {0.0}
    wrong = copy.deepcopy(lines)
    wrong[step][key] = math.nan
    assert [name for name, value in _distance(wrong, lines).items() if math.isnan(value)] == [key]


def test_a_run_without_a_self_check_is_found(kit: Kit) -> None:
    assert section("self_check", self_check, kit)["status"] == "skipped"
    lines = [{"step": 0, "split": "self_check", "numerics/margin_noise": 0.1}, {"step": 1, "loss": 0.7}]
    metrics = run_folder(kit, "on") / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert section("self_check", self_check, kit)["values"]["runs"][0]["margin_noise"] == 0.1
    metrics.write_text(json.dumps(lines[1]) + "\n")
    silent = section("self_check", self_check, kit)
    assert (silent["status"], silent["reason"]) == ("failed", "no self-check in throughput-sharing-on")


def test_throughput_keeps_what_it_has_when_one_run_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def measured(kit: Kit, sharing: str) -> dict[str, float]:
        if sharing == "off":
            raise Failed("out of memory")
        return {"pairs_per_second": 2.0}

    monkeypatch.setattr("benchmarks.gpu_kit.throughput.write_inputs", lambda kit: {})
    monkeypatch.setattr("benchmarks.gpu_kit.throughput._measured", measured)
    found = section("throughput", throughput, Kit(tmp_path, 2, TINY, {"gpus": []}, None))
    assert (found["status"], found["reason"]) == ("failed", "out of memory")
    assert found["values"]["prefix_sharing"] == {"on": {"pairs_per_second": 2.0}}


def test_sizes_follow_the_smallest_gpu() -> None:
    assert sizes_for([]) is TINY
    assert sizes_for([{"memory_gib": 79.1}, {"memory_gib": 23.6}]) is SMALL
    assert sizes_for([{"memory_gib": 79.1}] * 8) is LARGE
    assert LARGE.cases == SMALL.cases == CASES


@pytest.mark.parametrize("sizes", [TINY, SMALL, LARGE], ids=lambda sizes: sizes.name)
def test_trl_gets_whole_micro_batches_and_steps_to_compare(sizes: Any) -> None:
    assert all(sizes.examples_per_rank % pairs == 0 for pairs in sizes.trl_pairs)
    assert WARM_UP_STEPS < COMPARED_STEPS < sizes.steps


@pytest.mark.parametrize("sizes", [TINY, SMALL, LARGE], ids=lambda sizes: sizes.name)
def test_the_longest_example_fits_without_sharing(sizes: Any) -> None:
    assert 2 * (sizes.prompt[1] + sizes.completion[1]) <= sizes.max_tokens
    lengths = [[len(ids) for ids in row.values()] for row in random_rows(sizes, 50)]
    assert max(prompt for prompt, _, _ in lengths) <= sizes.prompt[1]
    assert len({tuple(row) for row in lengths}) > 40
