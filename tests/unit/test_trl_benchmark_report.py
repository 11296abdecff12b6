"""What `benchmarks/trl` makes of its runs: equal losses first, then ratios, page and chart; and how it starts them."""

import copy
import json
import math
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from benchmarks.trl import __main__ as command
from benchmarks.trl import judging
from benchmarks.trl.chart import Bar, chart
from benchmarks.trl.launches import Launcher, our_run, their_run
from benchmarks.trl.matrix_peak import gflops_of, shapes_of
from benchmarks.trl.memory import peak_bytes
from benchmarks.trl.page import page
from benchmarks.trl.variants import Task, Variant

LOGS = [
    {"loss": 0.6931, "grad_norm": 8.0, "logps/chosen": -200.0, "logps/rejected": -300.0},
    {"loss": 0.6, "grad_norm": 7.0, "logps/chosen": -201.0, "logps/rejected": -310.0},
    {"loss": 0.5, "grad_norm": 6.0, "logps/chosen": -202.0, "logps/rejected": -320.0},
]


def run(*seconds: float, tokens: int = 100, mib: int = 1000) -> dict[str, Any]:
    steps = len(seconds)
    return {
        "seconds": list(seconds),
        "tokens": [tokens] * steps,
        "logs": copy.deepcopy(LOGS[:steps]),
        "peak_bytes": mib * 2**20,
    }


@pytest.fixture
def runs() -> judging.Runs:
    return {
        "ours": [run(9, 1, 1), run(9, 2, 1), run(9, 2, 2)],
        "trl": [run(9, 4, 4, tokens=250, mib=2000), run(9, 4, 5, mib=2000), run(9, 4, 4, mib=4000)],
        "trl+head": [run(9, 3, 3), run(9, 3, 3), run(9, 3, 3)],
        "trl+sorted": [{"failed": "ended by signal 9"}] * 3,
    }


# ---- the same work


def test_the_same_work_has_no_faults(runs: judging.Runs) -> None:
    runs["trl"][1]["logs"][2]["loss"] += 0.99e-4
    assert judging.faults(runs) == []
    assert judging.distances(runs)["trl"]["loss"] == pytest.approx(0.99e-4)
    assert judging.distances(runs)["ours"]["loss"] == 0 and "trl+sorted" not in judging.distances(runs)


@pytest.mark.parametrize(
    ("key", "value"),
    [("loss", 0.50011), ("loss", math.nan), ("grad_norm", 6.1), ("logps/chosen", -202.5), ("logps/rejected", -319.0)],
)
def test_other_work_is_a_fault(runs: judging.Runs, key: str, value: float) -> None:
    runs["trl"][2]["logs"][2][key] = value
    (fault,) = judging.faults(runs)
    assert fault.startswith(f"trl: {key} is ") and " from that of ours" in fault


def test_our_own_repeats_are_compared_too(runs: judging.Runs) -> None:
    runs["ours"][1]["logs"][1]["loss"] = 0.61
    assert judging.faults(runs)[0].startswith("ours: loss is 1.0e-02")


def test_a_step_that_is_missing_is_a_fault(runs: judging.Runs) -> None:
    del runs["trl"][1]["logs"][2]
    assert judging.faults(runs)[0].startswith("trl: loss is nan")


def test_losses_that_no_run_of_ours_confirms_are_a_fault(runs: judging.Runs) -> None:
    runs["trl+sorted"] = [run(9, 4, 4)]
    assert judging.faults(runs) == ["trl+sorted: ours+sorted did not end, so its losses are compared with nothing"]


# ---- numbers


def test_speed_is_of_the_timed_steps_alone(runs: judging.Runs) -> None:
    found = judging.summary(runs, warm_up=1, pairs=12, flops=60 * 10**9, peak_gflops=100.0)
    assert list(found) == ["ours", "trl", "trl+head"]
    assert found["ours"]["pairs_per_second"] == {"median": 4.0, "least": 3.0, "most": 6.0}
    assert found["ours"]["gflops"]["median"] == 20.0 and found["ours"]["of_peak"] == pytest.approx(0.2)
    assert found["trl"]["tokens"] == 500 and found["trl"]["peak_mib"]["median"] == 2000


def test_ratios_are_of_neighbours_and_then_the_median(runs: judging.Runs) -> None:
    found = judging.ratios(runs, warm_up=1)
    assert found["stock"] == {"median": 3.0, "least": 2.0, "most": 4.0}
    assert found["best"] == {"name": "trl+head", "of": 2, "median": 2.0, "least": 1.5, "most": 3.0}
    assert found["memory"] == {"median": 0.5, "least": 0.25, "most": 0.5}
    assert "trl+sorted" not in found["over"] and "ours" not in found["over"]


def test_a_repeat_that_failed_takes_nothing_from_the_others(runs: judging.Runs) -> None:
    runs["trl"][0] = {"failed": "not done after 5 s"}
    found = judging.ratios(runs, warm_up=1)
    assert found["stock"] == {"median": 2.5, "least": 2.0, "most": 3.0}
    assert judging.summary(runs, 1, 12, 1, 1.0)["trl"]["repeats"] == 2


def test_without_trl_there_is_no_ratio_to_it(runs: judging.Runs) -> None:
    found = judging.ratios({"ours": runs["ours"], "ours-head": runs["trl"]}, warm_up=1)
    assert found["stock"] is None and found["best"] is None and found["memory"] is None
    assert found["over"]["ours-head"]["median"] == 3.0


def test_stock_alone_is_not_called_the_fastest(runs: judging.Runs) -> None:
    """Of what failed nothing is known: it does not make stock the fastest of several either."""
    del runs["trl+head"]
    found = judging.ratios(runs, warm_up=1)
    assert found["best"] is None and found["stock"]["median"] == 3.0


def test_another_variant_without_stock_is_the_fastest_of_one(runs: judging.Runs) -> None:
    del runs["trl"]
    found = judging.ratios(runs, warm_up=1)
    assert found["stock"] is None and (found["best"]["name"], found["best"]["of"]) == ("trl+head", 1)


# ---- page and chart


@pytest.fixture
def report(runs: judging.Runs) -> dict[str, Any]:
    lengths = {"mean": 10.0, "50%": 9, "longest": 30}
    settings = {"repeats": 3, "steps": 3, "warm_up": 1, "threads": 2, "pairs_per_step": 6, "max_tokens": 2048}
    machine = {"commit": "abc", "checkout_is_changed": True, "cpu": "EPYC", "cores": 2, "memory_gib": 23.4}
    return {
        "title": "Ours and TRL's: hh",
        "name": "2026-01-02-hh",
        "date": "2026-01-02 03:04 UTC",
        "command": "python -m benchmarks.trl",
        "machine": {**machine, "system": "Linux", "versions": {"torch": "2.13.0"}},
        "settings": {**settings, "deepspeed": "zero3_cpu"},
        "data": {
            "name": "hh",
            "pairs": 12,
            "examples": 12,
            "prompt": lengths,
            "completion": lengths,
            "tokens": 300,
            "padding": 2.5,
            "padding_of_all": 2.75,
        },
        "flops": 60 * 10**9,
        "peaks": [100.0, 90.0],
        "parts": [command.part(True, runs, 1, 12, 60 * 10**9, 100.0)],
    }


def test_the_page_has_the_ratios_and_what_failed(report: dict[str, Any], tmp_path: Path) -> None:
    text = page(report)
    assert "hh, recomputed: ours over TRL stock 3 (2 to 4)" in text
    assert "ours over the fastest of 2 TRL variants that ran (trl+head) 2 (1.5 to 3)" in text
    assert "peak memory as a share of TRL stock's 0.5 (0.25 to 0.5)" in text
    assert "ours does 20.0% of the fastest matrix product" in text
    assert "- trl+sorted failed, in 3 of the repeats: ended by signal 9" in text
    assert "| ours | 4 (3 to 6) | 200 | 1000 (1000 to 1000) | 20 (15 to 30) | 20.0% |" in text
    assert all(line == line.rstrip() for line in text.splitlines()) and text.isascii()
    command.write(report, tmp_path)
    (svg,) = tmp_path.glob("*.svg")
    assert f"({svg.name})" in text and (tmp_path / "2026-01-02-hh.md").read_text() == text
    assert json.loads((tmp_path / "2026-01-02-hh.json").read_text()) == report


def test_the_page_of_stock_alone_has_its_ratio_once(report: dict[str, Any], runs: judging.Runs) -> None:
    few = {name: runs[name] for name in ("ours", "trl")}
    report["parts"] = [command.part(True, few, 1, 12, 60 * 10**9, 100.0)]
    text = page(report)
    assert text.count("hh, recomputed: ours over") == 1 and "ours over TRL stock 3 (2 to 4)" in text
    assert "the fastest of" not in text


def test_other_work_has_no_ratio_on_the_page(report: dict[str, Any], runs: judging.Runs, tmp_path: Path) -> None:
    runs["trl"][0]["logs"][0]["loss"] = 0.7
    report["parts"] = [command.part(True, runs, 1, 12, 60 * 10**9, 100.0)]
    text = page(report)
    assert "nothing is compared" in text and "- trl: loss is 6.9e-03" in text
    assert "ours over TRL" not in text and "pairs/s" not in text
    command.write(report, tmp_path)
    assert not list(tmp_path.glob("*.svg"))
    assert command.status(report) == 1


def test_the_exit_code_says_whether_ours_ended(report: dict[str, Any]) -> None:
    assert command.status(report) == 0  # what failed was one of TRL's
    del report["parts"][0]["summary"]["ours"]
    assert command.status(report) == 1


def test_the_chart_is_svg_to_scale() -> None:
    text = chart("a < b", "pairs", [Bar("long", 4.0, 3.0, 6.0, emphasis=True), Bar("short", 2.0, 2.0, 2.0)])
    root = ElementTree.fromstring(text)
    bars = [node for node in root if node.tag.endswith("rect")][1:]
    assert float(bars[0].attrib["width"]) == pytest.approx(2 * float(bars[1].attrib["width"]), abs=0.2)
    assert bars[0].attrib["fill"] != bars[1].attrib["fill"]
    words = [node.text for node in root if node.tag.endswith("text")]
    assert words == ["a < b, pairs", "long", "4 (3 to 6)", "short", "2 (2 to 2)"]
    ElementTree.fromstring(chart("empty", "", []))


# ---- launches


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return Task("model", tmp_path, 3, 2, 2, 2, 1024, (900, 2000), "zero3_cpu")


def interpreter(folder: Path, body: str) -> str:
    """A program that is started in the place of TRL's interpreter: its arguments are -m, module, OUT, SETTINGS."""
    path = folder / "python"
    path.write_text(f"#!{sys.executable}\nimport json, os, sys, time\n{body}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("print('MemoryError'); sys.exit(3)", "exit code 3: MemoryError"),
        ("os.kill(os.getpid(), 9)", "signal 9 (9: the machine had no memory left)"),
        ("time.sleep(60)", "not done after 1 s"),
        ("pass", "exit code 0"),
    ],
)
def test_a_process_that_fails_is_told_and_not_raised(task: Task, tmp_path: Path, body: str, reason: str) -> None:
    found = Launcher(task, interpreter(tmp_path, body), 1.0).measure(Variant.named("trl"), True, "x")
    assert reason in found["failed"] and list(found) == ["failed"]


def test_a_process_of_trl_is_told_what_to_do_and_read(task: Task, tmp_path: Path) -> None:
    written = {"ends": [1.0, 3.0, 4.5], "tokens": [7, 8], "logs": [{**one, "more": 1} for one in LOGS[:2]]}
    written |= {"peak_bytes": 5, "version": "1.16.0", "optimizer": "x"}
    body = f"""settings = json.load(open(sys.argv[4]))
assert sys.argv[2] == 'benchmarks.trl.their_run' and os.environ['OMP_NUM_THREADS'] == '2', sys.argv
assert settings['pairs_per_step'] == 2 and settings['completion_only_head']
open(sys.argv[3], 'w').write({json.dumps(written)!r})"""
    found = Launcher(task, interpreter(tmp_path, body), 60.0).measure(Variant.named("trl+head"), True, "x")
    assert found["seconds"] == [2.0, 1.5] and found["logs"] == LOGS[:2] and found["version"] == "1.16.0"
    assert their_run(tmp_path / "x") == found


def test_a_run_of_ours_is_read_from_its_metrics(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    lines = [{"step": 0, "split": "self_check"}] + [{**one, "time/step": 2.0, "tokens_processed": 9} for one in LOGS]
    (tmp_path / "x" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "x.json").write_text(json.dumps({"peak_bytes": 5}))
    found = our_run(tmp_path / "x")
    assert found == {"seconds": [2.0] * 3, "tokens": [9] * 3, "logs": LOGS, "peak_bytes": 5}


def test_the_machine_is_measured() -> None:
    shapes = shapes_of({"hidden_size": 8, "intermediate_size": 16, "vocab_size": 32})
    assert shapes["head"][1:] == (8, 32) and "square 1024" in shapes
    assert gflops_of(64, 64, 64, seconds=0.01) > 0
    assert 2**20 < peak_bytes() < 2**50


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    config = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 8, "vocab_size": 200}))
    words = ["trl", "--data", "synthetic:chat", "--model", str(tmp_path), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", words)
    return words


@pytest.mark.parametrize(("moved", "status"), [(0.0, 0), (0.01, 1)])
def test_the_command_takes_turns_and_writes(
    moved: float,
    status: int,
    call: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    order: list[str] = []

    class Recorded(Launcher):
        def measure(self, variant: Variant, recompute: bool, label: str) -> dict[str, Any]:
            order.append(f"{variant.name} {recompute}")
            if variant.name == "trl+head":
                return {"failed": "ended by signal 9"}
            found = run(9, 2, 2) if variant.side == "ours" else {**run(9, 4, 4), "version": "1.16.0"}
            found["logs"][2]["loss"] += moved * (variant.side == "trl")
            return found

        def peak(self, label: str) -> dict[str, float]:
            return {"square": 100.0}

    monkeypatch.setattr(command, "Launcher", Recorded)
    call += ["--variants", "ours", "trl", "trl+head", "--recomputation", "on", "off", "--repeats", "2", "--steps", "3"]
    assert command.main() == status
    turn = [f"{name} {recompute}" for recompute in (True, False) for name in ("ours", "trl", "trl+head")]
    assert order == turn * 2
    (written,) = (tmp_path / "out").glob("*.json")
    found = json.loads(written.read_text())
    assert found["data"]["pairs"] == 16 and found["settings"]["pairs_per_step"] == 8
    assert found["machine"]["versions"]["trl"] == "1.16.0" and found["name"].endswith("-synthetic-chat")
    said = capsys.readouterr().out
    assert ("synthetic-chat, kept: ours over TRL stock 2 (2 to 2)" in said) == (status == 0)
    assert ("fault: trl: loss" in said) == (status == 1)


@pytest.mark.parametrize(
    "wrong", [["--variants", "trl+packing"], ["--warm-up", "6"], ["--data", "synthetic:nothing"], ["--repeats", "0"]]
)
def test_a_mistake_in_the_call_is_told_before_anything_runs(
    wrong: list[str], call: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    call += wrong
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert stopped.value.code == 2 and "error: " in capsys.readouterr().err
