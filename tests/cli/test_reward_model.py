"""`dpo-dist sample --reward-model`: scores are those of a plain forward, whatever is padded, and survive a kill."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from dpo_dist.config import DataSource
from dpo_dist.data import PreferenceExample, open_source
from dpo_dist.sampling import journal, rewarding
from tests.byte_tokenizer import EOS, save_tokenizer
from tests.cli.test_sample import ROWS, _quick, local, model, read, remote, sample, save_model, server
from tests.openai_server import Server, longer, serving

__all__ = ["_quick", "model", "sample", "server"]

OTHER = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"  # not the sampled model's


def save_reward_model(folder: Path, template: str | None = OTHER, **settings: Any) -> Path:
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    values = {"vocab_size": 264, "max_position_embeddings": 512, "num_labels": 1, **sizes, **settings}
    made = LlamaForSequenceClassification(LlamaConfig(**values))
    with torch.no_grad():
        made.score.weight.mul_(30)  # so that scores differ by more than rounding
    made.save_pretrained(folder)
    save_tokenizer(folder, template, bos=False)
    return folder


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reward_model(tmp_path_factory.mktemp("reward"))


def plain_scores(folder: Path, loaded: PreTrainedModel, texts: list[str]) -> list[float]:
    """One text at a time, without padding, in float64."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scores = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, truncation=False, padding=False)["input_ids"]
        with torch.no_grad():
            scores.append(float(loaded.eval().double()(input_ids=torch.tensor([ids])).logits[0, 0]))
    return scores


def rendered(row: dict[str, Any]) -> list[str]:
    """What OTHER makes of each whole conversation."""
    return [
        "".join(f"[{message['role']}] {message['content']}\n" for message in [*row["prompt"], *answer])
        for answer in row["completions"]
    ]


@pytest.mark.parametrize("pad", [None, EOS])
@pytest.mark.parametrize("size", ["1", "4"])
def test_scores_are_those_of_a_plain_forward(
    sample: Any, model: Path, tmp_path: Path, pad: int | None, size: str
) -> None:
    folder = save_reward_model(tmp_path / "reward", pad_token_id=pad)
    code, output = sample(ROWS, *local(model, "--reward-model", str(folder), "--batch-size", size))
    assert code == 0 and "4 rows; train on them with data.train.0.path=" in output, output
    loaded = LlamaForSequenceClassification.from_pretrained(folder)
    for row in read(tmp_path / "out.jsonl"):
        assert row["scores"] == pytest.approx(plain_scores(folder, loaded, rendered(row)), abs=1e-5)
        assert len(set(row["scores"])) == 3
    examples = list(open_source(DataSource(path=str(tmp_path / "out.jsonl")), "data.train.0").examples())
    assert len(examples) == 4 and all(isinstance(one, PreferenceExample) and one.pairs for one in examples)


def test_padding_changes_no_score(reward: Path) -> None:
    scorer = rewarding.RewardModel(reward, False)
    ids = [(5, 6, 7), (8,) * 40, (9, 10), tuple(range(4, 200))]
    together = scorer.scores(ids)
    assert together == pytest.approx([scorer.scores([one])[0] for one in ids], abs=1e-5)
    assert scorer.scores(ids[::-1]) == pytest.approx(together[::-1], abs=1e-5)


def test_an_encoder_scores_as_well(tmp_path: Path) -> None:
    """Its padding is hidden by the mask alone."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    made = BertForSequenceClassification(BertConfig(vocab_size=264, num_labels=1, **sizes)).eval()
    made.save_pretrained(tmp_path)
    ids = [(5, 6, 7), (8,) * 40]
    with torch.no_grad():
        expected = [float(made(torch.tensor([one])).logits[0, 0]) for one in ids]
    assert rewarding.RewardModel(tmp_path, False).scores(ids) == pytest.approx(expected, abs=1e-5)


def test_text_is_scored_as_it_stands(sample: Any, model: Path, tmp_path: Path) -> None:
    """Prompt and completion as one string, with an end, and without a template."""
    folder = save_reward_model(tmp_path / "reward", None)
    assert sample(ROWS, *local(model, "--text", "--reward-model", str(folder)))[0] == 0
    loaded = LlamaForSequenceClassification.from_pretrained(folder)
    for row in read(tmp_path / "out.jsonl"):
        texts = [f"{row['prompt']}{one}</s>" for one in row["completions"]]
        assert row["scores"] == pytest.approx(plain_scores(folder, loaded, texts), abs=1e-5)


def test_it_goes_on_where_it_ended(
    sample: Any, server: Server, reward: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = remote(server, "--reward-model", str(reward), "--batch-size", "1")
    assert sample(ROWS, *options, out="whole.jsonl")[0] == 0
    server.requests.clear()
    score, batches = rewarding.RewardModel.scores, list[int]()

    def counted(self: Any, ids: Any) -> Any:
        batches.append(len(ids))
        if len(batches) == 3:
            raise MemoryError("no room")
        return score(self, ids)

    monkeypatch.setattr(rewarding.RewardModel, "scores", counted)
    code, output = sample(ROWS, *options)
    assert code == 1 and "out of memory; lower --batch-size" in output and not (tmp_path / "out.jsonl").exists()
    assert sample(ROWS, *options)[0] == 0
    assert batches == [3] * 5 and len(server.requests) == 12  # two of four prompts had been scored
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_another_reward_model_or_a_judge_begins_anew(
    sample: Any, server: Server, reward: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the same completions."""
    other = save_reward_model(tmp_path / "other", rms_norm_eps=0.5)
    first = ["--reward-model", str(reward)]
    assert sample(ROWS, *remote(server, *first), out="first.jsonl")[0] == 0
    monkeypatch.setattr("dpo_dist.cli.generating.write_rows", _fails)
    assert sample(ROWS, *remote(server, *first))[0] == 1
    monkeypatch.setattr("dpo_dist.cli.generating.write_rows", journal.write_rows)
    server.requests.clear()
    partial = (tmp_path / "out.jsonl.partial").read_bytes()
    assert sample(ROWS, *remote(server, "--reward-model", str(other)))[0] == 0
    ours, theirs = read(tmp_path / "out.jsonl"), read(tmp_path / "first.jsonl")
    assert [row["completions"] for row in ours] == [row["completions"] for row in theirs]
    assert all(one["scores"] != two["scores"] for one, two in zip(ours, theirs, strict=True))
    (tmp_path / "out.jsonl").unlink()
    (tmp_path / "out.jsonl.partial").write_bytes(partial)
    with serving(longer) as judge:
        assert sample(ROWS, *remote(server, "--judge", judge.url, "--judge-model", "j"))[0] == 0
    assert len(judge.requests) == 24 and not server.requests


def _fails(*_: Any) -> None:
    raise MemoryError("no room")


# ---- mistakes


def test_a_judge_and_a_reward_model_are_too_many(sample: Any, server: Server, reward: Path) -> None:
    both = ["--reward-model", str(reward), "--judge", "http://localhost:1", "--judge-model", "j"]
    code, output = sample(ROWS, *remote(server, *both))
    assert code == 2 and f"--judge=http://localhost:1 and --reward-model={reward} both score; give one" in output
    assert not server.requests


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"num_labels": 3}, "has 3 labels, and a score is one number; give a model with num_labels=1"),
        ({"template": None}, "has no chat template, and the prompts are messages"),
        ({"max_position_embeddings": 24}, "tokens, and the model reads 24; lower --max-new-tokens"),
    ],
)
def test_models_that_give_no_score(
    sample: Any, server: Server, tmp_path: Path, settings: dict[str, Any], error: str
) -> None:
    folder = save_reward_model(tmp_path / "reward", **settings)
    code, output = sample(ROWS, *remote(server, "--reward-model", str(folder)))
    assert code == 2 and f"--reward-model={folder}" in output and error in output, output
    assert "Traceback" not in output and bool(server.requests) == ("max_position_embeddings" in settings)


def test_a_language_model_is_no_reward_model(sample: Any, server: Server, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "policy")
    code, output = sample(ROWS, *remote(server, "--reward-model", str(folder)))
    assert code == 2 and "has 2 labels" in output and not server.requests
    values = json.loads((folder / "config.json").read_text())
    one_label = {"id2label": {"0": "good"}, "label2id": {"good": 0}, "max_position_embeddings": 512}
    (folder / "config.json").write_text(json.dumps({**values, **one_label}))
    code, output = sample(ROWS, *remote(server, "--reward-model", str(folder)))
    assert code == 2 and "lacks 1 weights of its architecture, such as score.weight" in output


@pytest.mark.parametrize(
    ("name", "error"), [("./none", "--reward-model=./none does not exist"), ("empty", "has no config.json")]
)
def test_a_reward_model_that_is_not_there(sample: Any, server: Server, tmp_path: Path, name: str, error: str) -> None:
    (tmp_path / "empty").mkdir()
    name = name if name.startswith(".") else str(tmp_path / name)
    code, output = sample(ROWS, *remote(server, "--reward-model", name))
    assert code == 2 and error in output and not server.requests


def test_a_template_that_refuses_a_prompt(sample: Any, server: Server, tmp_path: Path) -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + OTHER
    folder = save_reward_model(tmp_path / "reward", strict)
    rows = [*ROWS, {"prompt": "Hi", "system": "Be brief."}]
    code, output = sample(rows, *remote(server, "--reward-model", str(folder)))
    assert code == 2 and "prompts.jsonl:5: the chat template of --reward-model=" in output and "no system" in output


def test_scores_that_are_no_numbers(sample: Any, server: Server, tmp_path: Path) -> None:
    folder = save_reward_model(tmp_path / "reward")
    made = LlamaForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        made.score.weight.fill_(float("nan"))
    made.save_pretrained(folder)
    code, output = sample(ROWS, *remote(server, "--reward-model", str(folder)))
    assert code == 1 and "is not finite" in output
