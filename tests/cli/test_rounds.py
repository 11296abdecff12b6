"""`dpo-dist round`: what each round trains on and from, what is said of it, and what an interruption leaves."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from dpo_dist.cli import app, round_running
from dpo_dist.config import load_config
from dpo_dist.rounds import Round, Rounds, Verdict

CONFIG: dict[str, Any] = {
    "model": {"model_name_or_path": "demo", "dtype": "float32"},
    "data": {"train": [{"path": "feedback"}], "holdout": 0.3},
    "evaluation": {"eval_steps": 2, "eval_on_start": True},
    "train": {"output_dir": "rounds", "max_steps": 2},
    "parallel": {"deepspeed": "zero0_cpu"},
}


def run(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(words))
    return result.exit_code, result.output


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rounds.yaml").write_text(yaml.safe_dump(CONFIG))
    feed(tmp_path, "first")
    return tmp_path


def feed(folder: Path, name: str) -> None:
    events = [{"prompt": f"{name} {n}", "completion": "no", "corrected": "yes"} for n in range(20)]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    assert run("feedback", "add", f"{name}.jsonl", "--to", "feedback")[0] == 0


class Trainer:
    """In the place of `dpo-dist launch`: notes what it is told, and leaves what a run leaves."""

    def __init__(self) -> None:
        self.configs: list[Any] = []
        self.code = 0
        self.accuracies: list[tuple[float, float] | None] = [(0.5, 0.9)]  # of each version, before and after

    def __call__(self, words: list[str], where: Any) -> int:
        config = load_config(words[0], words[1:])
        self.configs.append(config)
        if self.code:
            return self.code
        out = Path(config.train.output_dir)
        (out / "model").mkdir(parents=True)
        (out / "model" / "dpo_dist.json").write_text(json.dumps({"step": 2}))
        lines: list[dict[str, Any]] = [{"step": 1, "loss": 0.7}]
        for name, both in zip(config.data.evaluation_names, self.accuracies, strict=True):
            if both is None:  # thumbs that stay unpaired have a loss, and no pairs
                lines += [{"step": step, "split": "evaluation", "dataset": name, "loss": 0.5} for step in (0, 2)]
                continue
            for step, accuracy in zip((0, 2), both, strict=True):
                lines.append({"step": step, "split": "evaluation", "dataset": name, "rewards/accuracies": accuracy})
            lines.append({"step": 4, "split": "evaluation", "dataset": name, "rewards/accuracies": 0.0})  # not exported
        (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return 0


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Trainer:
    found = Trainer()
    monkeypatch.setattr(round_running, "_launched", found)
    return found


def test_each_round_begins_with_the_last_ones_model_and_reads_all_feedback(folder: Path, trainer: Trainer) -> None:
    code, said = run("round", "rounds.yaml", "--reference", "first")
    assert code == 0
    assert "train-0001:holdout (new): 90.0%" in said and "the next round begins with rounds/round-001/model" in said
    feed(folder, "second")
    trainer.accuracies = [(0.9, 0.89), (0.4, 0.8)]
    code, said = run("round", "rounds.yaml", "train.learning_rate=1e-6", "--reference", "first")
    assert code == 0
    assert "train-0001:holdout (old): 90.0% -> 89.0%" in said and "train-0002:holdout (new): 40.0% -> 80.0%" in said
    first, second = trainer.configs
    assert [Path(source.path).name for source in first.data.train] == ["train-0001.parquet"]
    assert [Path(source.path).name for source in second.data.train] == ["train-0001.parquet", "train-0002.parquet"]
    assert (first.model.model_name_or_path, first.model.reference_name_or_path) == ("demo", None)
    assert second.model.model_name_or_path == str(folder / "rounds/round-001/model")
    assert second.model.reference_name_or_path == "demo"
    assert (second.train.output_dir, second.train.learning_rate) == ("rounds/round-002", 1e-6)
    code, said = run("round", "rounds.yaml")
    assert (code, "nothing was added since round 2; add some with" in said) == (2, True)


def test_a_round_that_forgets_is_not_the_start_of_the_next(folder: Path, trainer: Trainer) -> None:
    assert run("round", "rounds.yaml")[0] == 0
    feed(folder, "second")
    trainer.accuracies = [(0.0, 0.47), (0.0, 0.9)]  # compared with its own start: 0 before, and half is no change
    code, said = run("round", "rounds.yaml")
    assert code == 1
    assert "train-0001:holdout (old): 47.0%" in said and "not accepted: old feedback is kept worse" in said
    feed(folder, "third")
    trainer.accuracies = [(0.0, 0.49), (0.0, 0.9), (0.0, 0.9)]
    code, said = run("round", "rounds.yaml")
    assert code == 0
    assert trainer.configs[2].model.model_name_or_path == str(folder / "rounds/round-001/model")
    assert "train-0002:holdout (new)" in said  # no accepted round was trained on it
    assert [one.accepted for one in Rounds(load_config("rounds.yaml")).all()] == [True, False, True]


@pytest.mark.parametrize("reference", ["last", "first"])
def test_a_version_without_held_out_pairs_is_not_judged(folder: Path, trainer: Trainer, reference: str) -> None:
    assert run("round", "rounds.yaml")[0] == 0
    feed(folder, "second")
    trainer.accuracies = [(0.5, 0.6), None]
    code, said = run("round", "rounds.yaml", "--reference", reference)
    assert (code, "train-0002:holdout: no pair of it is held out, so it is not judged" in said) == (0, True), said
    assert [one.dataset for one in Rounds(load_config("rounds.yaml")).all()[1].verdicts] == ["train-0001:holdout"]


@pytest.mark.parametrize(
    ("before", "after", "is_old", "fallen"),
    [(0.9, 0.88, True, False), (0.9, 0.87, True, True), (0.9, 0.1, False, False), (None, 0.47, True, True)],
)
def test_what_has_fallen(before: float | None, after: float, is_old: bool, fallen: bool) -> None:
    assert Verdict("a", is_old, before, after).has_fallen(0.0201) is fallen


def test_an_interrupted_round_goes_on_with_the_same_data(folder: Path, trainer: Trainer) -> None:
    trainer.code = 143
    code, said = run("round", "rounds.yaml")
    assert (code, "round 1 has not ended; the same command goes on with it" in said) == (143, True)
    feed(folder, "second")
    trainer.code = 0
    code, said = run("round", "rounds.yaml")
    assert (code, "goes on with round 1" in said) == (0, True)
    assert [len(config.data.train) for config in trainer.configs] == [1, 1]
    assert {config.checkpoint.resume for config in trainer.configs} == {"auto"}
    assert [one.name for one in (folder / "rounds").glob("*.json")] == ["round-001.json"]


def test_a_look_writes_nothing(folder: Path) -> None:
    code, said = run("round", "rounds.yaml", "--dry-run")
    assert (code, "round-001" in said and "torchrun" in said) == (0, True)
    assert not (folder / "rounds").exists()


@pytest.mark.parametrize(
    ("override", "error"),
    [
        ("data.train=[{path: first.jsonl}]", "data.train does not name one set of feedback"),
        ("data.train=[{path: feedback}, {path: feedback}]", "data.train does not name one set of feedback"),
        ("data.train=[{path: feedback, limit: 3}]", "data.train.0 has more than a path"),
        ("data.holdout=0", "data.holdout=0 leaves nothing to judge a round by"),
        ("evaluation.eval_on_start=false", "set evaluation.eval_on_start=true"),
        ("adapter.peft_type=lora", "adapter.peft_type=lora: a round hands a whole model to the next"),
    ],
)
def test_mistakes(folder: Path, override: str, error: str) -> None:
    overrides = [override]
    if override == "data.holdout=0":
        overrides.append("data.evaluation=[{path: first.jsonl}]")
    code, said = run("round", "rounds.yaml", *overrides)
    assert (code, error in said) == (2, True), said


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"number": 1'])
def test_a_damaged_record_of_a_round(folder: Path, text: str) -> None:
    (folder / "rounds").mkdir()
    (folder / "rounds" / "round-001.json").write_text(text)
    code, said = run("round", "rounds.yaml")
    assert (code, "round-001.json is not what a round has written" in said) == (2, True), said


def test_a_set_without_feedback(folder: Path) -> None:
    (folder / "empty").mkdir()
    code, said = run("round", "rounds.yaml", "data.train=[{path: empty}]")
    assert (code, "holds no feedback; add some with" in said) == (2, True)


def test_the_run_is_started_by_launch(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    started: list[Any] = []

    class Process:
        def wait(self) -> int:
            return 7

    monkeypatch.setattr(subprocess, "Popen", lambda words: started.append(words) or Process())
    assert run("round", "rounds.yaml", "--gpus", "1")[0] == 7
    assert started[0][1:5] == ["-m", "dpo_dist", "launch", "rounds.yaml"] and started[0][-2:] == ["--gpus", "1"]


def test_a_round_is_written_down_as_it_is_read(folder: Path) -> None:
    rounds = Rounds(load_config("rounds.yaml"))
    one = Round(1, ["a"], 0, "demo", None, True, [Verdict("a", False, None, 0.5)])
    rounds.write(one)
    assert rounds.all() == [one]
