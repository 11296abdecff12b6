"""Rows as a supervised run reads them: one completion, with the same border as in a run on preferences."""

import json
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.config import DataConfig, DataSource
from dpo_dist.data import PreferenceExample, RowFault
from dpo_dist.data.columns import ignored_columns
from dpo_dist.data.rows import parse_row
from dpo_dist.errors import DataError
from dpo_dist.tokenization import TokenizedDataset, TokenizerSpec, prepare_dataset
from tests.byte_tokenizer import save_tokenizer

USER, ANSWER, OTHER = (
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "assistant", "content": "What?"},
)
SYSTEM = {"role": "system", "content": "Be brief."}
HH = "\n\nHuman: Hi\n\nAssistant:"


def parsed(row: dict[str, Any]) -> PreferenceExample:
    example = parse_row(row, "f:1", demonstrations=True)
    assert isinstance(example, PreferenceExample), example
    assert example.pairs == ()
    return example


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"prompt": "Q", "completion": "A"}, "Q", "A"),
        ({"prompt": [USER], "completion": [ANSWER]}, (USER,), (ANSWER,)),
        ({"prompt": [USER], "completion": ANSWER, "system": "Be brief."}, (SYSTEM, USER), (ANSWER,)),
        ({"messages": [USER, ANSWER]}, (USER,), (ANSWER,)),
        ({"messages": [USER, ANSWER, USER, OTHER]}, (USER, ANSWER, USER), (OTHER,)),
        ({"messages": [USER, OTHER, ANSWER]}, (USER,), (OTHER, ANSWER)),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}, (USER,), (ANSWER,)),
        ({"conversations": [USER], "chosen": ANSWER, "rejected": OTHER}, (USER,), (ANSWER,)),
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, "Q", "A"),
        ({"prompt": "Q", "chosen": "A", "rejected": None}, "Q", "A"),
        ({"prompt": "Q", "chosen": "A"}, "Q", "A"),
        ({"prompt": "Q", "chosen": "A", "rejected": "A"}, "Q", "A"),  # useless as a preference only
        ({"prompt": [USER], "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, (USER,), (ANSWER,)),
        ({"chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, (USER,), (ANSWER,)),
        ({"prompt": "Hi", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, (USER,), (ANSWER,)),
        ({"chosen": f"{HH} Hello!", "rejected": f"{HH} What?"}, HH, " Hello!"),
        ({"prompt_ids": [1, 2], "completion_ids": [3]}, (1, 2), (3,)),
        ({"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4]}, (1, 2), (3,)),
        ({"prompt": "Q", "completions": ["A", "B", "C"], "scores": [1, 3, 3]}, "Q", "B"),
        ({"prompt": "Q", "completions": ["A", "B"], "ranks": [1, 1]}, "Q", "A"),
    ],
)
def test_the_completion_of_every_shape(row: dict[str, Any], prompt: Any, completion: Any) -> None:
    example = parsed(row)
    assert example.prompt == prompt
    assert example.completions == (completion,)
    assert example.weight == 1.0
    assert parsed({**row, "weight": 0.25}).weight == 0.25


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Q", "completion": " "}, "empty_completion"),
        ({"prompt": "", "completion": "A"}, "empty_prompt"),
        ({"prompt": "Q", "completion": None}, "missing_value"),
        ({"messages": [USER]}, "no_answer"),
        ({"messages": []}, "no_answer"),
        ({"messages": [ANSWER]}, "empty_prompt"),
    ],
)
def test_faults_of_a_row(row: dict[str, Any], reason: str) -> None:
    fault = parse_row(row, "f:7", demonstrations=True)
    assert isinstance(fault, RowFault)
    assert (fault.reason, fault.source) == (reason, "f:7")


@pytest.mark.parametrize(
    ("row", "error"),
    [
        (
            {"text": "whole"},
            "no column completion (the row has text); a row of a supervised run holds prompt, completion",
        ),
        ({"prompt": "Q"}, "no column completion"),
        ({"completion": "A"}, "no column prompt"),
        ({"prompt": "Q", "completion": [ANSWER]}, "prompt is a string, completion is not"),
        ({"prompt": [USER], "completion": [USER, USER]}, "completion begins with a message of role 'user'"),
        ({"messages": "Hi"}, "messages='Hi' is of the wrong type"),
        (
            {"prompt": "Q", "completion": "A", "label": False},
            "label=False: a supervised run learns every completion",
        ),
        ({"prompt": "Q", "completion": "A", "weight": 0}, "weight=0 is not above 0"),
        ({"prompt": "Q", "completion": "A", "images": ["x"]}, "images is set"),
    ],
)
def test_faults_of_a_file(row: dict[str, Any], error: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_row(row, "f:7", demonstrations=True)
    assert str(caught.value).startswith("f:7: ")
    assert error in str(caught.value)


@pytest.mark.parametrize(
    "row",
    [{"prompt": "Q", "completion": "A"}, {"messages": [USER, ANSWER]}, {"prompt_ids": [1], "completion_ids": [2]}],
)
def test_a_run_on_preferences_refuses_demonstrations(row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"f:1: the row is a demonstration, .*loss\.loss_type=sft"):
        parse_row(row, "f:1")


def test_columns_that_mean_nothing_are_named() -> None:
    row = {"prompt": "Q", "completion": "A", "margin": 1.0, "scores": [1], "id": 3}
    assert ignored_columns(row, demonstrations=True) == {"margin", "scores", "id"}
    assert ignored_columns({"prompt": "Q", "chosen": "A", "rejected": "B", "messages": [], "scores": [1]}) == {
        "messages",
        "scores",
    }
    ranked = {"prompt": "Q", "completions": ["A", "B"], "scores": [1, 2], "id": 3, "feedback_id": "3"}
    assert ignored_columns(ranked) == {"id"}


# ---- as token ids


@pytest.fixture
def spec(tmp_path: Path) -> TokenizerSpec:
    return save_tokenizer(tmp_path / "tokenizer")


def tokenized(
    tmp_path: Path, spec: TokenizerSpec, rows: list[Any], demonstrations: bool = True, **settings: Any
) -> TokenizedDataset:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = DataSource(path=str(path))
    data = DataConfig(train=[source], **settings)
    return prepare_dataset([source], data, spec, tmp_path / "cache", demonstrations=demonstrations)


ROWS = [
    {"prompt": "Say.", "chosen": " yes", "rejected": " no way"},
    {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER], "weight": 3.0},
    {"chosen": f"{HH} Hello!", "rejected": f"{HH} What?"},
]


def test_a_demonstration_is_a_pairs_chosen_completion_to_the_token(tmp_path: Path, spec: TokenizerSpec) -> None:
    pairs, alone = tokenized(tmp_path, spec, ROWS, False), tokenized(tmp_path, spec, ROWS)
    for pair, one in zip(pairs, alone, strict=True):
        assert one.prompt_ids == pair.prompt_ids
        assert one.completion_ids == (pair.completion_ids[0],)
        assert one.pairs == ()
    assert alone.weights.tolist() == [1.0, 3.0, 1.0]
    assert (alone.preferences.num_pairs, alone.preferences.max_completions) == (0, 1)
    assert alone.fingerprint != pairs.fingerprint
    assert alone.stats()["completion"]["sum"] == sum(len(pair.completion_ids[0]) for pair in pairs)


def test_what_is_learnt_of_a_conversation_ends_as_its_template_ends_a_turn(tmp_path: Path, spec: TokenizerSpec) -> None:
    (messages,) = tokenized(tmp_path, spec, [{"messages": [USER, ANSWER]}])
    (pair,) = tokenized(tmp_path, spec, [{"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]}], False)
    assert (messages.prompt_ids, messages.completion_ids[0]) == (pair.prompt_ids, pair.completion_ids[0])


def test_limits_hold_for_the_one_completion(tmp_path: Path, spec: TokenizerSpec) -> None:
    rows = [{"prompt": "Q", "chosen": "a" * 5, "rejected": "b" * 50}, {"prompt": "Q", "completion": "a" * 50}]
    dataset = tokenized(tmp_path, spec, rows, max_length=20, truncation_mode="drop")
    assert len(dataset) == 1  # the long rejected completion is not read
    assert dataset.bad_rows == {"over_long": 1}
    cut = tokenized(tmp_path, spec, rows, max_length=20, truncation_mode="keep_start")
    assert len(cut[1].prompt_ids) + len(cut[1].completion_ids[0]) == 20
