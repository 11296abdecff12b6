"""`benchmarks.stages`: its arithmetic, and what it does with losses that differ; launches are recorded ones."""

import sys

import pytest

from benchmarks import stages


def lines(seconds: float, pairs: int = 8, loss: float = 0.6) -> list[dict[str, float]]:
    first = {"time/step": 100.0, "pairs_per_second": 1.0, "loss": loss}
    return [
        *[first] * stages.WARM_UP,
        *({"time/step": s, "pairs_per_second": pairs / s, "loss": loss} for s in (seconds, 3 * seconds)),
    ]


def test_pace_leaves_out_the_warm_up() -> None:
    assert stages.pace(lines(2.0)) == pytest.approx(16 / 8.0)


@pytest.mark.parametrize(("slower", "code"), [(1.2, 0), (1.3, 1)])
def test_the_ratio_decides(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], slower: float, code: int
) -> None:
    monkeypatch.setattr(sys, "argv", ["stages", "--repeats", "1"])
    seconds = {"zero3_cpu": slower, "zero3_cpu, whole reference": 2.0}
    monkeypatch.setattr(stages, "measure", lambda case, *_: lines(seconds.get(case, 1.0)))
    assert stages.main() == code
    told = capsys.readouterr().out
    assert f"zero3_cpu over zero0_cpu: {1 / slower:.3f}" in told
    assert "zero3_cpu, whole reference over zero0_cpu: 0.500" in told  # is told and not judged


def test_other_losses_are_no_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["stages", "--repeats", "1"])
    monkeypatch.setattr(stages, "measure", lambda case, *_: lines(1.0, loss=0.6 if case == "zero3_cpu" else 0.7))
    with pytest.raises(SystemExit, match="not the same work"):
        stages.main()
