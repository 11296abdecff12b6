"""`dpo-dist compare`: runs of a sweep in one table."""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from dpo_dist.cli import app
from tests.golden.trajectories import FOLDER


def write_run(folder: Path, config: dict[str, Any], *lines: dict[str, Any], exported: int | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if exported is not None:
        (folder / "model").mkdir()
        (folder / "model/dpo_dist.json").write_text(json.dumps({"step": exported, "checkpoint": "", "files": {}}))
    return folder


def config(beta: float, out: str = "x", **train: Any) -> dict[str, Any]:
    return {
        "loss": {"beta": beta, "loss_type": ["sigmoid"]},
        "train": {"output_dir": out, "learning_rate": 1e-6, **train},
        "checkpoint": {"save_steps": 10 if out == "x" else 20},
    }


def held_out(step: int, loss: float, dataset: str = "pairs", **values: float) -> dict[str, Any]:
    return {"step": step, "split": "evaluation", "dataset": dataset, "loss": loss, **values}


def report(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["compare", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    folder = tmp_path / "sweep"
    line = {"step": 4, "loss": 0.1, "rewards/accuracies": 0.99}
    write_run(
        folder / "a", config(0.1), line, held_out(4, 0.6, **{"rewards/accuracies": 0.7}), held_out(4, 0.9, "other"),
        exported=4,
    )  # fmt: skip
    write_run(folder / "b", config(0.5, "y"), line, held_out(2, 0.5), held_out(4, 0.8), exported=2)
    write_run(folder / "c", config(0.3), line, held_out(2, 0.7), {"step": 3, "loss": 0.2})
    return folder


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(text.splitlines()))


def test_the_best_comes_first_with_what_the_runs_differ_in(sweep: Path) -> None:
    rows = rows_of(report(str(sweep), "--csv"))
    # The model of b is that of step 2, the best one, and not the last.
    assert [(row["run"], row["loss.beta"], row["state"], row["step"], row["loss"]) for row in rows] == [
        ("b", "0.5", "finished", "2", "0.5000"),
        ("a", "0.1", "finished", "4", "0.6000"),
        ("c", "0.3", "at step 4", "2", "0.7000"),
    ]
    assert list(rows[0]) == ["run", "loss.beta", "state", "step", "loss", "rewards/accuracies", "rewards/margins"]
    assert [row["rewards/accuracies"] for row in rows] == ["", "0.7000", ""]


def test_as_a_table_and_as_json(sweep: Path) -> None:
    table = report(str(sweep))
    assert [word for word in ("b ", "a ", "c ", "0.5000", "loss.beta") if word not in table] == []
    assert max(map(len, table.splitlines())) < 120
    values = json.loads(report(str(sweep), "--json"))
    assert values[0] == {
        "run": "b",
        "settings": {"loss.beta": 0.5},
        "state": "finished",
        "step": 2,
        "values": {"loss": 0.5},
    }


def test_another_metric_order_or_set(sweep: Path) -> None:
    rows = rows_of(report(str(sweep), "--csv", "--metric", "rewards/accuracies", "--metric", "loss"))
    assert [row["run"] for row in rows] == ["a", "b", "c"]  # the largest; without a value by name
    assert list(rows[0])[-2:] == ["rewards/accuracies", "loss"]
    rows = rows_of(report(str(sweep), "--csv", "--metric", "rewards/accuracies", "--by", "loss"))
    assert [row["run"] for row in rows] == ["b", "a", "c"]
    (row,) = rows_of(report(str(sweep / "a"), "--csv", "--dataset", "other"))
    assert row["loss"] == "0.9000"


def test_runs_without_a_held_out_set_and_without_lines(tmp_path: Path) -> None:
    train = {"step": 4, "loss": 0.25, "rewards/margins": 1.5}
    start = {"step": 0, "split": "self_check", "numerics/margin_noise": 0.0}
    write_run(tmp_path / "one/run", config(0.1), start, train)
    write_run(tmp_path / "two/run", config(0.1, seed=7))
    with (tmp_path / "one/run/metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # it is writing
    rows = rows_of(report(str(tmp_path / "one/run"), str(tmp_path / "two/run"), "--csv"))
    assert [(row["run"], row["train.seed"], row["state"], row["loss"]) for row in rows] == [
        (str(tmp_path / "one/run"), "", "at step 4", "0.2500"),
        (str(tmp_path / "two/run"), "7", "at step 0", ""),
    ]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere"], "nowhere holds no run (no config.yaml), nor do the folders in it"),
        (["sweep", "--metric", "kl"], "--metric=kl is in no run; there are loss, rewards/accuracies"),
        (["sweep", "--by", "kl"], "--by=kl is in no run; there are loss, rewards/accuracies"),
        (["sweep", "--dataset", "other"], "--dataset=other was not evaluated in sweep/b; there are pairs"),
        (["broken"], "broken/config.yaml is not the configuration of a run"),
    ],
)
def test_mistakes(sweep: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str) -> None:
    monkeypatch.chdir(sweep.parent)
    Path("broken").mkdir()
    Path("broken/config.yaml").write_text("[]")
    result = CliRunner().invoke(app, ["compare", *arguments])
    assert result.exit_code == 2 and says in result.output
    result = CliRunner().invoke(app, ["compare", "sweep", "--csv", "--json"])
    assert result.exit_code == 2


def test_real_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(
        f"model: {{model_name_or_path: {FOLDER / 'tiny_policy'}, dtype: float32}}\n"
        f"data: {{train: [{{path: {FOLDER / 'pairs.jsonl'}, limit: 6}}]}}\n"
        "train: {output_dir: out, examples_per_step: 3, max_steps: 1, learning_rate: 0.001}\n"
        "log: {report_to: []}\nparallel: {deepspeed: zero0_cpu}\n"
    )
    for beta in ("0.1", "0.4"):
        done = CliRunner().invoke(app, ["train", "run.yaml", f"loss.beta={beta}", f"train.output_dir=sweep/{beta}"])
        assert done.exit_code == 0, done.output
    rows = rows_of(report("sweep", "--csv"))
    assert {(row["run"], row["loss.beta"], row["state"]) for row in rows} == {
        ("0.1", "0.1", "finished"),
        ("0.4", "0.4", "finished"),
    }
    assert set(rows[0]) == {"run", "loss.beta", "state", "step", "loss", "rewards/accuracies", "rewards/margins"}


def test_torch_is_not_needed(sweep: Path) -> None:
    import subprocess

    code = "import sys; from dpo_dist.cli import app; app(['compare', sys.argv[1]], standalone_mode=False)"
    code += "; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code, str(sweep)], check=False).returncode == 0
