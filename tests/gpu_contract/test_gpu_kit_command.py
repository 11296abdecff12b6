"""The command of the kit, without a run of it: arguments, time, and parts that fail beside parts that do not."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.gpu_kit.__main__ import IMPORTED, PARTS, main, section
from benchmarks.gpu_kit.kit import BUDGETS, LIMIT_SECONDS, TINY, Failed, Kit, Skipped, cause_in
from tests.launching import REPOSITORY, environment, kill_group, start

pytestmark = pytest.mark.thorough

# Waits in the standard library alone: nothing has to be imported for it.
WAITING = ("timeit", "-n1", "-r1", "import time; time.sleep(123)")


@pytest.fixture
def called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As `benchmarks/gpu.sh --out new` on a machine without a GPU; the folder that it writes."""

    def look_around(kit: Kit, num_ranks: int | None) -> dict[str, Any]:
        kit.environment, kit.num_ranks = {"gpus": []}, num_ranks or 1
        return {}  # the page shows nothing of it

    monkeypatch.setattr("benchmarks.gpu_kit.__main__._look_around", look_around)
    monkeypatch.setattr("benchmarks.gpu_kit.__main__.warm_imports", lambda: None)
    monkeypatch.setattr("signal.signal", lambda *_: None)  # pytest's own stays
    monkeypatch.setattr(sys, "argv", ["gpu.sh", "--out", str(tmp_path / "new")])
    return tmp_path / "new"


def test_who_is_killed_leaves_what_it_has(called: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(kit: Kit) -> dict[str, Any]:
        raise SystemExit(143)  # as the handler of SIGTERM does

    parts = {"first": lambda kit: {"margins": 1.5}, "second": killed}
    monkeypatch.setattr("benchmarks.gpu_kit.kit.BUDGETS", {"environment": 1.0, "first": 1.0, "second": 1.0})
    monkeypatch.setattr("benchmarks.gpu_kit.__main__.PARTS", parts)
    with pytest.raises(SystemExit):
        main()
    sections = json.loads((called / "gpu.json").read_text())["sections"]
    assert sections.keys() == {"environment", "first"} and sections["first"]["values"] == {"margins": 1.5}
    assert "| first | ok |" in (called / "gpu.md").read_text()


def test_who_is_killed_in_the_first_part_leaves_the_environment(called: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(kit: Kit) -> dict[str, Any]:
        raise SystemExit(143)

    monkeypatch.setattr("benchmarks.gpu_kit.kit.BUDGETS", {"environment": 1.0, "first": 1.0})
    monkeypatch.setattr("benchmarks.gpu_kit.__main__.PARTS", {"first": killed})
    with pytest.raises(SystemExit):
        main()
    assert json.loads((called / "gpu.json").read_text())["sections"].keys() == {"environment"}
    assert "| environment | ok |" in (called / "gpu.md").read_text()


def test_what_is_imported_beforehand_can_be() -> None:
    subprocess.run([sys.executable, "-c", f"import {', '.join(IMPORTED)}"], check=True, capture_output=True)


def test_what_fails_or_takes_too_long_does_not_stop_the_rest(
    called: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks(kit: Kit) -> dict[str, Any]:
        raise ZeroDivisionError("no")

    def hangs(kit: Kit) -> dict[str, Any]:
        kit.run(1, "hanging", *WAITING, limit=100)
        return {}

    def ends(kit: Kit) -> dict[str, Any]:
        kit.run(1, "ending", "timeit", "-n1", "-r1", "pass", limit=100)
        return {"margins": 1.5}

    parts = {"breaks": breaks, "hangs": hangs, "late": ends, "ends": ends}
    budgets = {"environment": 1.0, "breaks": 1.0, "hangs": 1.0, "late": 0.2, "ends": 60.0}
    monkeypatch.setattr("benchmarks.gpu_kit.kit.BUDGETS", budgets)
    monkeypatch.setattr("benchmarks.gpu_kit.kit.SHORTEST_LAUNCH_SECONDS", 0.5)
    monkeypatch.setattr("benchmarks.gpu_kit.__main__.PARTS", parts)
    before = psutil.Process().children(recursive=True)
    assert main() == 1
    sections = json.loads((called / "gpu.json").read_text())["sections"]
    found = {name: (one["status"], one.get("reason")) for name, one in sections.items()}
    assert found == {
        "environment": ("ok", None),
        "breaks": ("failed", "ZeroDivisionError: no"),
        "hangs": ("failed", "hanging was not done after 3 s"),
        "late": ("skipped", "no time left: this part ends 3 s after the start"),
        "ends": ("ok", None),
    }
    assert sections["ends"]["values"] == {"margins": 1.5}
    page = (called / "gpu.md").read_text()
    assert "| hangs | failed | 3 | hanging was not done after 3 s |" in page and "| ends | ok |" in page
    assert sorted(path.name for path in called.iterdir()) == ["gpu.json", "gpu.md", "logs"]
    assert psutil.Process().children(recursive=True) == before
    assert "failed: ZeroDivisionError: no" in capsys.readouterr().err


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE  # dead, but init has not asked yet
    except psutil.NoSuchProcess:
        return False


def test_a_launch_that_is_killed_takes_its_ranks_with_it(tmp_path: Path) -> None:
    # torchrun puts every rank into a session of its own: to kill torchrun's would leave them, and wait for them.
    noting = f"import os; open(f'{{os.getpid()}}.pid', 'w').close(); {WAITING[-1]}"
    process = start(2, *WAITING[:-1], noting, cwd=tmp_path)
    deadline = time.monotonic() + 60
    while len(ranks := [int(path.stem) for path in tmp_path.glob("*.pid")]) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(ranks) == 2
    kill_group(process)
    process.communicate(timeout=30)  # nobody is left who could write
    assert not any(_runs(rank) for rank in ranks)


def test_every_part_has_its_time_and_what_others_left(tmp_path: Path) -> None:
    assert list(BUDGETS) == ["environment", *PARTS]
    assert sum(BUDGETS.values()) == LIMIT_SECONDS == 600
    kit = Kit(tmp_path, 2, TINY, {"gpus": []}, None)
    kit.begin("environment")
    assert kit.ends_after == BUDGETS["environment"]
    kit.begin("golden")
    assert kit.ends_after == BUDGETS["environment"] + BUDGETS["golden"]
    kit.begin(list(PARTS)[-1])
    assert kit.ends_after == LIMIT_SECONDS


def test_when_the_time_is_up_nothing_is_started(tmp_path: Path) -> None:
    kit = Kit(tmp_path, 2, TINY, {"gpus": []}, None, started=time.monotonic() - LIMIT_SECONDS + 1)
    late = section("bandwidth", PARTS["bandwidth"], kit)
    assert (late["status"], late["reason"]) == ("skipped", "no time left: this part ends 600 s after the start")


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
    called: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def look_around(kit: Kit, num_ranks: int) -> dict[str, Any]:
        kit.environment, kit.num_ranks = {"gpus": [{"memory_gib": 80.0}]}, num_ranks
        return kit.environment

    monkeypatch.setattr("benchmarks.gpu_kit.__main__._look_around", look_around)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--ranks", "2"])
    assert main() == 2
    assert "--ranks=2 is more than this machine's number of GPUs; give at most 1" in capsys.readouterr().err
    assert not called.exists()


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


def test_the_cause_of_a_failed_launch_is_its_first_error() -> None:
    assert cause_in("tokenised\nerror: no such file\nTraceback\nChildFailedError: x\n") == "error: no such file"
    assert cause_in("a\n  RuntimeError: CUDA out of memory\n") == "RuntimeError: CUDA out of memory"
    aborted = "terminate called without an active exception"
    assert cause_in(f"a\n{aborted}\nx.ChildFailedError:\nerror_file: <N/A>\n===\n") == aborted
    assert cause_in("a\nb\n") == "b"
    assert cause_in("") == "nothing was printed"
