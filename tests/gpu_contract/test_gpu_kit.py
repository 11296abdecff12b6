"""The kit for people with a GPU, run here: every part measures something, and a fault is found."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_kit.__main__ import NOT_YET, PARTS, main, section
from benchmarks.gpu_kit.golden import BOUNDS
from benchmarks.gpu_kit.kit import LARGE, LIMIT_SECONDS, SMALL, TINY, Failed, Kit, Skipped, cause_in, sizes_for
from benchmarks.gpu_kit.throughput import memory_faults, random_rows, throughput
from tests.golden.trajectories import CASES
from tests.launching import REPOSITORY, environment

# Slow: some 145 seconds of processor time, nearly all for importing torch in its launches.
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
    assert list(sections) == ["environment", *PARTS, *NOT_YET]
    for name in ("environment", *PARTS):
        assert sections[name]["status"] == "ok", sections[name]
        found = list(numbers(sections[name]["values"]))
        assert found and all(math.isfinite(number) for number in found), name
    assert {name: sections[name]["reason"] for name in NOT_YET} == dict.fromkeys(NOT_YET, "not part of this kit yet")


def test_golden_has_float32_and_bfloat16_and_says_why_kernels_are_left_out(sections: dict[str, Any]) -> None:
    runs = {(run["dtype"], run["kernel"]): run for run in sections["golden"]["values"]["runs"]}
    assert runs["float32", "sdpa"]["status"] == runs["bfloat16", "sdpa"]["status"] == "ok"
    exact, halved = (runs[dtype, "sdpa"]["distance"] for dtype in ("float32", "bfloat16"))
    assert all(halved[key] <= BOUNDS[key] for key in BOUNDS)
    assert all(exact[key] < halved[key] / 10 for key in BOUNDS), "bfloat16 must have been computed in bfloat16"
    for kernel in ("flash_attn", "torch"):
        assert runs["bfloat16", kernel]["status"] == "skipped"
        assert "needs a CUDA device" in runs["bfloat16", kernel]["reason"]


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
    assert len(runs) == 4 and all(len(run["said"]) == 4 for run in runs.values())
    assert runs["throughput-sharing-on"]["proof"]["bitwise"] is True
    sizes = sections["bandwidth"]["values"]["sizes"]
    assert [line["bytes"] for line in sizes] == list(TINY.messages)
    assert all(value > 0 for line in sizes for value in line.values())


def test_the_page_shows_it_and_nothing_else_is_left(whole: Path, sections: dict[str, Any]) -> None:
    assert sorted(path.name for path in whole.iterdir()) == ["gpu.json", "gpu.md", "logs"]
    text = (whole / "gpu.md").read_text()
    assert text.isascii()
    for name in sections:
        assert f"| {name} | {sections[name]['status']} |" in text
    assert f"| on | {sections['throughput']['values']['prefix_sharing']['on']['num_parameters']:,} | sdpa |" in text


def test_a_wrong_beta_is_found_and_ends_with_1(tmp_path: Path) -> None:
    done = run_kit(tmp_path, "--only", "golden", "--plant", "beta", "--ranks", "1", "--out", "planted")
    assert done.returncode == 1, done.stderr
    planted = json.loads((tmp_path / "planted" / "gpu.json").read_text())["sections"]
    assert list(planted) == ["environment", "golden", *NOT_YET]
    assert planted["golden"]["status"] == "failed"
    runs = {(run["dtype"], run["kernel"]): run for run in planted["golden"]["values"]["runs"]}
    assert "step 1: " in runs["float32", "sdpa"]["reason"]
    # In bfloat16 the beta is right, and so is no longer what the float32 run has.
    assert "rewards/margins" in runs["bfloat16", "sdpa"]["reason"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "full"], "error: --out=full is there already; give a folder that is new or empty"),
        (
            ["--out", "full/file/new"],
            "error: --out=full/file/new cannot be made (Not a directory); give another folder",
        ),
        (["--ranks", "0"], "0 is no number of processes; give 1 or more"),
        (["--only", "speed"], "invalid choice: 'speed'"),
    ],
)
def test_mistakes_end_with_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpu.sh", *arguments])
    with pytest.raises(SystemExit) as ended:
        sys.exit(main())
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_more_ranks_than_gpus_is_a_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def look_around(kit: Kit, num_ranks: int) -> dict[str, Any]:
        kit.environment, kit.num_ranks = {"gpus": [{"memory_gib": 80.0}]}, num_ranks
        return kit.environment

    monkeypatch.setattr("benchmarks.gpu_kit.__main__._look_around", look_around)
    monkeypatch.setattr("signal.signal", lambda *_: None)  # pytest's own stays
    monkeypatch.setattr(sys, "argv", ["gpu.sh", "--ranks", "2", "--out", str(tmp_path / "new")])
    assert main() == 2
    assert "--ranks=2 is more than this machine's number of GPUs; give at most 1" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_throughput_keeps_what_it_has_when_one_run_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def measured(kit: Kit, sharing: str) -> dict[str, float]:
        if sharing == "off":
            raise Failed("out of memory")
        return {"pairs_per_second": 2.0}

    monkeypatch.setattr("benchmarks.gpu_kit.throughput._write_inputs", lambda kit: {})
    monkeypatch.setattr("benchmarks.gpu_kit.throughput._measured", measured)
    found = section("throughput", throughput, Kit(tmp_path, 2, TINY, {"gpus": []}, None))
    assert (found["status"], found["reason"]) == ("failed", "out of memory")
    assert found["values"]["prefix_sharing"] == {"on": {"pairs_per_second": 2.0}}


def test_when_the_time_is_up_nothing_is_started(tmp_path: Path) -> None:
    kit = Kit(tmp_path, 2, TINY, {"gpus": []}, None, started=time.monotonic() - LIMIT_SECONDS + 1)
    late = section("bandwidth", PARTS["bandwidth"], kit)
    assert (late["status"], late["reason"]) == ("skipped", "no time left of 600 s")


def test_an_environment_without_the_packages_is_told_what_to_do(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    python.chmod(0o755)
    variables = environment({"PATH": os.pathsep.join([str(tmp_path), os.environ["PATH"]])})
    command = [str(REPOSITORY / "benchmarks" / "gpu.sh")]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "has no torch" in done.stderr and "Install" in done.stderr


def test_a_part_that_breaks_is_its_own_section(capsys: pytest.CaptureFixture[str]) -> None:
    def raises(error: Exception) -> dict[str, Any]:
        raise error

    broken = section("x", raises, ZeroDivisionError("no"))
    assert broken["status"] == "failed" and broken["reason"] == "ZeroDivisionError: no" and broken["traceback"]
    assert section("x", raises, Failed("off", {"a": 1}))["values"] == {"a": 1}
    assert section("x", raises, Skipped("not here"))["status"] == "skipped"
    assert section("x", lambda: {"a": 1})["status"] == "ok"


def test_sizes_follow_the_smallest_gpu() -> None:
    assert sizes_for([]) is TINY
    assert sizes_for([{"memory_gib": 79.1}, {"memory_gib": 23.6}]) is SMALL
    assert sizes_for([{"memory_gib": 79.1}] * 8) is LARGE
    assert LARGE.cases == SMALL.cases == CASES


@pytest.mark.parametrize("sizes", [TINY, SMALL, LARGE], ids=lambda sizes: sizes.name)
def test_the_longest_example_fits_without_sharing(sizes: Any) -> None:
    assert 2 * (sizes.prompt[1] + sizes.completion[1]) <= sizes.max_tokens
    lengths = [[len(ids) for ids in row.values()] for row in random_rows(sizes, 50)]
    assert max(prompt for prompt, _, _ in lengths) <= sizes.prompt[1]
    assert len({tuple(row) for row in lengths}) > 40


def test_the_cause_of_a_failed_launch_is_its_first_error() -> None:
    assert cause_in("tokenised\nerror: no such file\nTraceback\nChildFailedError: x\n") == "error: no such file"
    assert cause_in("a\n  RuntimeError: CUDA out of memory\n") == "RuntimeError: CUDA out of memory"
    assert cause_in("a\nb\n") == "b"
    assert cause_in("") == "nothing was printed"
