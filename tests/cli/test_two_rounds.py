"""The example of docs/feedback.md on a small model: two rounds, and `sample` killed in the middle of both."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from dpo_dist.cli import app, round_running
from dpo_dist.sampling.judging import JUDGE_PROMPT
from tests.byte_tokenizer import CHATML, save_tokenizer
from tests.forking import fork_ranks
from tests.full_stop_judge import verdict
from tests.openai_server import longer, serving
from tests.two_rounds import Story, as_typed, full_stops, kill_in_the_middle, play, told

NUM_PROMPTS = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, and so undecided that its answers differ."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=264, max_position_embeddings=96, **sizes)).save_pretrained(folder)
    save_tokenizer(folder, CHATML)
    return folder


def story_in(folder: Path, model: Path, killed_in: tuple[int, ...]) -> Story:
    """The page's, but for what would take minutes."""
    folder.mkdir()
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "Question {n}?"}}\n' for n in range(NUM_PROMPTS)))
    return Story(
        folder,
        str(model),
        prompts,
        sampling=("-k", "3", "--max-new-tokens", "12", "--batch-size", "1"),
        overrides=(f"model.model_name_or_path={model}", "train.max_steps=2", "train.learning_rate=0.01"),
        killed_in=killed_in,
        killed_at=9,
    )


def in_this_process(words: Sequence[str], folder: Path) -> int:
    """As `as_typed`, without importing everything anew; what is to be killed is a process of its own all the same."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        return CliRunner().invoke(app, list(words)).exit_code
    finally:
        os.chdir(before)


def forked(words: list[str], where: Any) -> int:
    """In the place of `dpo-dist launch`: the same run in a process that has imported everything."""
    return fork_ranks(1, "dpo_dist", "train", *words, cwd=Path.cwd(), env=dict(os.environ)).returncode


def decided(rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the paths, which have the folder in them."""
    return [{name: value for name, value in one.items() if name != "versions"} for one in rounds]


def test_two_rounds_with_kills_end_as_without(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPO_DIST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(round_running, "_launched", forked)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    with serving(longer) as judge:
        rounds = play(story_in(killed, model, (1, 2)), judge.url, in_this_process)
        undisturbed = play(story_in(whole, model, ()), judge.url, in_this_process)
    assert decided(rounds) == decided(undisturbed)
    for number in (1, 2):
        name = f"ranked{number}.jsonl"
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
        assert not (killed / f"{name}.partial").exists()
        version = f"feedback/train-{number:04d}.parquet"  # when it was added stands in its metadata
        assert pq.read_table(killed / version).to_pylist() == pq.read_table(whole / version).to_pylist()
        weights = f"rounds/round-{number:03d}/model/model.safetensors"
        assert (killed / weights).read_bytes() == (whole / weights).read_bytes()
    assert (killed / "ranked1.jsonl").read_bytes() != (killed / "ranked2.jsonl").read_bytes()
    number = rf"\d+ of {3 * NUM_PROMPTS}"
    said = full_stops(killed)
    assert re.fullmatch(f"answers that end with a full stop: {number} in round 1, {number} in round 2", said), said
    lines = told(rounds)
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        "round 1, train-0001", "round 2, train-0001", "round 2, train-0002"
    ]  # fmt: skip
    assert all(" -> " in line for line in lines[2:])


def test_thumbs_that_stay_unpaired_are_trained_on_beside_pairs(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DPO_DIST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(round_running, "_launched", forked)
    monkeypatch.chdir(tmp_path)
    pairs = [{"prompt": f"Pair {n}", "completion": "no", "corrected": "yes"} for n in range(12)]
    thumbs = [{"prompt": f"Thumb {n}", "completion": "so", "label": n % 2 == 0} for n in range(12)]
    words = ["round", "two_rounds", f"model.model_name_or_path={model}", "train.max_steps=2"]

    def add_and_train(name: str, events: list[dict[str, Any]]) -> str:
        (tmp_path / name).write_text("".join(json.dumps(event) + "\n" for event in events))
        assert CliRunner().invoke(app, ["feedback", "add", name, "--to", "feedback"]).exit_code == 0
        ended = CliRunner().invoke(app, [*words, "loss.loss_type=[sigmoid, kto]"])
        assert ended.exit_code == 0, ended.output
        return ended.output

    assert "train-0001:holdout (new):" in add_and_train("first.jsonl", pairs + thumbs)
    steps = (tmp_path / "rounds/round-001/metrics.jsonl").read_text().splitlines()
    assert any({"rewards/desirable", "rewards/undesirable"} & json.loads(line).keys() for line in steps)
    said = add_and_train("second.jsonl", [{**one, "prompt": f"Other {n}"} for n, one in enumerate(thumbs)])
    assert "train-0001:holdout (old):" in said
    assert "train-0002:holdout: no pair of it is held out, so it is not judged" in said


def test_a_command_as_typed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert as_typed(["feedback", "show", "none"], tmp_path) == 2
    said = capfd.readouterr()
    assert said.out.startswith("\n$ dpo-dist feedback show none\n") and "none holds no feedback" in said.err


def test_a_command_that_ends_before_its_kill(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"it had ended \(0\) before it could be killed"):
        kill_in_the_middle(["--help"], tmp_path, tmp_path / "none", 1)


@pytest.mark.parametrize(
    ("first", "second", "better"),
    [
        ("Yes.", "No", "A"), ("No", "Yes.", "B"), ("Yes, it is.", "Yes. ", "B"), ("No", "Never", "TIE"),
        ("A.", "B.", "TIE"),
    ],
)  # fmt: skip
def test_what_the_judge_likes(first: str, second: str, better: str) -> None:
    asked = JUDGE_PROMPT.format(prompt="Is it?", first=first, second=second)
    assert verdict("/v1/chat/completions", {"messages": [{"content": asked}]}) == better
