"""What a live reference moves under ZeRO-3: the benchmark itself, and that it can fail.

Proved: elements in the collectives of a step, on two ranks, when nothing is kept between two uses of a weight. Not
proved: bytes on a wire, or time.
"""

import re
import subprocess
import sys

import pytest

from benchmarks.reference_traffic import __main__ as benchmark
from tests.launching import REPOSITORY, environment

pytestmark = pytest.mark.thorough


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.reference_traffic", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, check=False)


def test_a_reference_costs_what_it_should() -> None:
    done = _run()
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:] if line.startswith("|")]
    together = {(row[0], int(row[1])): float(row[4]) for row in rows}
    assert len(together) == 9
    for g in (1, 2, 4):
        assert together["per micro-batch", g] == 4 * g
        assert together["once for a step", g] == 3 * g + 1
        assert together["cached", g] == 3 * g


@pytest.mark.slow
def test_a_small_model_that_is_kept_is_noticed() -> None:
    done = _run("--defaults")
    assert done.returncode == 1
    assert float(re.findall(r"at most ([\d.]+) % off", done.stdout)[0]) > 20


@pytest.mark.parametrize(("off", "code"), [(0.0, 0), (0.02, 0), (0.04, 1), (-0.04, 1)])
def test_more_than_three_percent_is_an_error(monkeypatch: pytest.MonkeyPatch, off: float, code: int) -> None:
    measured = {
        setting: {str(g): [formula(g) - g, g] for g in benchmark.MICRO_BATCHES}
        for setting, formula in benchmark.EXPECTED.items()
    }
    measured["cached"]["2"][0] += off * 6
    monkeypatch.setattr(benchmark, "run", lambda folder, keep_defaults: measured)
    monkeypatch.setattr(sys, "argv", ["benchmark"])
    with pytest.raises(SystemExit) as ended:
        benchmark.main()
    assert int(ended.value.code or 0) == code
