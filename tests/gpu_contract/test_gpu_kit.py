"""The kit for people with a GPU, run here: every part measures something, and a fault is found.

What needs no run of it is in test_gpu_kit_parts.py, which is not slow.
"""

import gzip
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_kit.__main__ import PARTS
from benchmarks.gpu_kit.golden import BOUNDS
from benchmarks.gpu_kit.kit import TINY
from benchmarks.gpu_kit.profiling import TOP, TRACE_FILE, summary
from benchmarks.gpu_kit.throughput import memory_faults
from tests.gpu_contract.rates import rates_alone
from tests.launching import REPOSITORY, environment

# Slow: some 160 seconds of processor time, nearly all for importing torch in its launches.
pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]


def run_kit(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`benchmarks/gpu.sh` with this Python, called from another folder."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = [str(REPOSITORY / "benchmarks" / "gpu.sh"), *arguments]
    variables = environment({"PATH": path})
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False, timeout=580)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kit")
    done = run_kit(folder)
    assert done.returncode == 0, done.stderr
    return folder / "gpu_report"


@pytest.fixture(scope="module")
def sections(whole: Path) -> dict[str, Any]:
    return json.loads((whole / "gpu.json").read_text())["sections"]


def numbers(values: Any) -> Iterator[float]:
    """All numbers in a section."""
    if isinstance(values, dict):
        values = list(values.values())
    if isinstance(values, list):
        for value in values:
            yield from numbers(value)
    elif isinstance(values, int | float) and not isinstance(values, bool):
        yield values


def test_every_part_is_there_and_says_what_it_did(sections: dict[str, Any]) -> None:
    assert list(sections) == ["environment", *PARTS]
    for name in sections:
        if name == "trl" and find_spec("trl") is None:
            assert sections[name]["status"] == "skipped"
            assert sections[name]["reason"] == "TRL is not installed; pip install trl to compare"
            continue
        assert sections[name]["status"] == "ok", sections[name]
        found = list(numbers(sections[name]["values"]))
        assert found and all(math.isfinite(number) for number in found), name


def test_golden_has_float32_and_bfloat16_and_says_why_kernels_are_left_out(sections: dict[str, Any]) -> None:
    runs = {(run["dtype"], run["kernel"]): run for run in sections["golden"]["values"]["runs"]}
    assert runs["float32", "sdpa"]["status"] == runs["bfloat16", "sdpa"]["status"] == "ok"
    exact, halved = (runs[dtype, "sdpa"]["distance"] for dtype in ("float32", "bfloat16"))
    assert all(halved[key] <= BOUNDS[key] for key in BOUNDS)
    assert all(exact[key] < halved[key] / 10 for key in BOUNDS), "bfloat16 must have been computed in bfloat16"
    for kernel in ("flash_attn", "torch"):
        assert runs["bfloat16", kernel]["status"] == "skipped"
        assert "needs a CUDA device" in runs["bfloat16", kernel]["reason"]


def test_every_rate_has_its_share(sections: dict[str, Any]) -> None:
    assert list(rates_alone({name: one.get("values") for name, one in sections.items() if name != "ceilings"})) == []
    assert sections["ceilings"]["values"]["ranks"] == 2


def test_variants_are_other_runs(sections: dict[str, Any]) -> None:
    kept, *options, long, larger = sections["variants"]["values"]["runs"]
    assert [one["status"] for one in options] == ["ok", "ok", "skipped"]  # Liger's kernels
    assert (kept["max_tokens"], long["max_tokens"]) == (TINY.max_tokens, 4 * TINY.max_tokens)
    assert larger["variant"] == f"{larger['num_parameters']:,} parameters"
    assert larger["num_parameters"] > kept["num_parameters"]
    assert long["tokens_processed"] / long["steps"] > kept["tokens_processed"] / kept["steps"]


def test_throughput_and_memory_belong_to_the_model(sections: dict[str, Any]) -> None:
    values = sections["throughput"]["values"]
    shared, unshared = (values["prefix_sharing"][key] for key in ("on", "off"))
    assert shared["kernel"] == "sdpa" and shared["steps"] == unshared["steps"] == TINY.steps - 2
    assert shared["tokens_processed"] < unshared["tokens_processed"]
    assert shared["tokens_unshared"] == unshared["tokens_unshared"]
    assert 0 < shared["seconds_per_step"]["least"] <= shared["seconds_per_step"]["most"]
    ranks = sections["memory"]["values"]["ranks"]
    assert [one["rank"] for one in ranks] == [0, 1] == list(range(len(shared["peak_bytes_of_ranks"])))
    for one in ranks:
        # bfloat16 twice, float32 gradients, master and two moments, over two ranks
        assert math.isclose(
            sum(one["held_bytes"].values()), (2 + 2 + 4 + 12) * shared["num_parameters"] / 2, rel_tol=0.03
        )
        assert one["rest_bytes"] == one["peak_bytes"] - sum(one["held_bytes"].values()) > 0
        one["held_bytes"]["gradients"] *= 2
    assert [fault for fault in memory_faults(ranks) if "gradients" in fault] == memory_faults(ranks) != []


def test_self_check_and_bandwidth(sections: dict[str, Any]) -> None:
    runs = {run["run"]: run for run in sections["self_check"]["values"]["runs"]}
    assert len(runs) == 4 and all(len(run["said"]) == 5 for run in runs.values())
    assert runs["throughput-sharing-on"]["proof"]["bitwise"] is True
    sizes = sections["bandwidth"]["values"]["sizes"]
    assert [line["bytes"] for line in sizes] == list(TINY.messages)
    assert all(value > 0 for line in sizes for value in line.values())


def test_the_trace_is_that_of_the_training_loop(whole: Path, sections: dict[str, Any]) -> None:
    values = sections["profile"]["values"]
    assert (values["device"], len(values["top"])) == ("cpu", TOP)
    assert values["top"][0]["name"] in {"aten::mm", "aten::addmm"}
    assert values["collectives"]["calls"] > 10 and 0 < values["collectives"]["share"] < 1
    assert 0 < sum(one["seconds"] for one in values["top"]) <= values["step_seconds"]
    with gzip.open(whole / TRACE_FILE, "rt") as file:
        trace = json.load(file)
    assert "host_name" not in trace and "traceName" not in trace
    assert summary(trace)["top"] == values["top"]
    names = {event["name"] for event in trace["traceEvents"]}
    assert {"Optimizer.step#CPUAdamW.step", "_ChunkedLogProbs", "_ChunkedLogProbsBackward"} <= names


def test_the_page_shows_it_and_nothing_else_is_left(whole: Path, sections: dict[str, Any]) -> None:
    assert sorted(path.name for path in whole.iterdir()) == ["gpu.json", "gpu.md", "logs", TRACE_FILE]
    text = (whole / "gpu.md").read_text()
    assert text.isascii()
    for name in sections:
        assert f"| {name} | {sections[name]['status']} |" in text
    assert f"| on | {sections['throughput']['values']['prefix_sharing']['on']['num_parameters']:,} | sdpa |" in text


def test_a_wrong_beta_is_found_and_ends_with_1(tmp_path: Path) -> None:
    done = run_kit(tmp_path, "--only", "golden", "--plant", "beta", "--ranks", "1", "--out", "planted")
    assert done.returncode == 1, done.stderr
    planted = json.loads((tmp_path / "planted" / "gpu.json").read_text())["sections"]
    assert list(planted) == ["environment", "golden"]
    assert planted["golden"]["status"] == "failed"
    runs = {(run["dtype"], run["kernel"]): run for run in planted["golden"]["values"]["runs"]}
    assert "step 1: " in runs["float32", "sdpa"]["reason"]
    # In bfloat16 the beta is right, and so is no longer what the float32 run has.
    assert "rewards/margins" in runs["bfloat16", "sdpa"]["reason"]
