"""Every kind of bad row: skipped and counted, or all of them in one message."""

import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.config import DataConfig, DataSource
from dpo_dist.data.example import MISSING_COLUMN, RowError
from dpo_dist.errors import DataError
from dpo_dist.tokenization import TokenizedDataset, TokenizerSpec, prepare_dataset
from tests.byte_tokenizer import save_tokenizer

GOOD = {"prompt": "Say it", "chosen": "yes", "rejected": "no"}
LONG = {**GOOD, "prompt": "long " * 30}
USER, YES, NO = ({"role": role, "content": text} for role, text in (("user", "Hi"), ("assistant", "a"), ("user", "b")))
# A line of a file, and the reason that it is counted under.
BAD = [
    ('{"prompt": "Say', "broken_json"),
    ("nonsense", "broken_json"),
    ("3", "wrong_type"),
    ("[]", "wrong_type"),
    ("{}", "missing_column"),
    ({"prompt": "p", "chosen": "c"}, "missing_column"),
    ({**GOOD, "rejected": None}, "missing_value"),
    ({**GOOD, "rejected": 3}, "wrong_type"),
    ({**GOOD, "rejected": [YES]}, "wrong_type"),
    ({**GOOD, "rejected": "\ud800"}, "broken_text"),
    ({**GOOD, "rejected": "yes"}, "identical_completions"),
    ({**GOOD, "rejected": " "}, "empty_completion"),
    ({**GOOD, "prompt": ""}, "empty_prompt"),
    ({**GOOD, "system": "Be brief"}, "unread_column"),
    ({**GOOD, "tools": [{"name": "x"}]}, "unread_column"),
    ({**GOOD, "images": ["a.png"]}, "unread_column"),
    ({**GOOD, "weight": 0}, "wrong_number"),
    ({**GOOD, "margin": "much"}, "wrong_number"),
    ({**GOOD, "chosen_probability": 2}, "wrong_number"),
    ({"prompt": "p", "completions": ["a", "b"], "scores": [1]}, "wrong_number"),
    ({"prompt": "p", "completions": ["a", "b"]}, "missing_column"),
    ({"prompt": "p", "completions": ["a"], "scores": [1]}, "wrong_type"),
    ({"prompt": [USER], "chosen": [NO], "rejected": [YES]}, "wrong_role"),
    ({"prompt": "p", "completion": "c"}, "no_preference"),
    ({"prompt": "p", "completion": "c", "label": "bad"}, "wrong_number"),
    ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"}, "prompts_differ"),
    ({"prompt": "other", "chosen": [USER, YES], "rejected": [USER, {**YES, "content": "c"}]}, "prompts_differ"),
    ({"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}, "mixed_kinds"),
    (LONG, "over_long"),
]
TIED = {"prompt": "p", "completions": ["a", "b"], "scores": [1, 1]}


def line_of(row: Any) -> str:
    return row if isinstance(row, str) else json.dumps(row)


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """Tokenise a file of these lines."""
    spec: TokenizerSpec = save_tokenizer(tmp_path / "tokenizer")

    def tokenized(rows: list[Any], **settings: Any) -> TokenizedDataset:
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(line_of(row) + "\n" for row in rows))
        source = DataSource(path=str(path))
        data = DataConfig(train=[source], max_length=80, **settings)
        return prepare_dataset([source], data, spec, tmp_path / "cache")

    return tokenized


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_every_kind_is_skipped_and_counted(run: Any, row: Any, reason: str) -> None:
    dataset = run([GOOD, row, GOOD], on_bad_row="skip")
    assert (len(dataset), dataset.bad_rows) == (2, {reason: 1})


def test_a_tie_is_left_out_and_counted(run: Any) -> None:
    dataset = run([GOOD, TIED, GOOD])
    assert (len(dataset), dataset.bad_rows) == (2, {"tied": 1})
    with pytest.raises(DataError, match=r"none of the 2 rows .* can be used \(tied: 2\)"):
        run([TIED, TIED])


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_a_single_one_is_told_in_one_line(run: Any, row: Any, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        run([GOOD, row, GOOD])
    text = str(caught.value)
    assert "pairs.jsonl:2: " in text and "\n" not in text
    assert text.endswith(f", or set data.on_bad_row=skip ({reason})")


def test_all_of_them_at_once(run: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        run(
            [
                GOOD,
                "nonsense",
                {**GOOD, "rejected": "yes"},
                {},
                GOOD,
                {},
                {"id": 1},
                {},
                LONG,
            ]
        )
    path = tmp_path / "pairs.jsonl"
    lines = str(caught.value).splitlines()
    assert lines[0] == (
        "data.train.0: 7 of 9 rows cannot be used; repair them, or set data.on_bad_row=skip to leave them out"
    )
    assert lines[1] == "  4 x missing_column, the first 3:"
    assert lines[2].startswith(f"    {path}:4: no column chosen (the row has none); a row holds prompt, chosen")
    assert lines[3] == f"    {path}:6: no column chosen (the row has none)"
    assert lines[4] == f"    {path}:7: no column chosen (the row has id)"
    assert lines[5:7] == [
        "  1 x broken_json:",
        f"    {path}:2: broken JSON (Expecting value at column 1); give one JSON object per line, or one array of "
        "objects for the whole file",
    ]
    assert lines[7:9] == [
        "  1 x identical_completions:",
        f"    {path}:3: chosen and rejected are identical; repair the row",
    ]
    assert lines[9] == "  1 x over_long:"
    assert lines[10].startswith(f"    {path}:9: prompt and completion have ")
    assert lines[10].endswith("or set data.truncation_mode=drop, keep_start or keep_end_of_prompt")
    assert len(lines) == 11
    assert not list((tmp_path / "cache").glob("*/"))


def test_over_long_rows_are_counted(run: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.train\.0: 5 of 6 rows cannot be used") as caught:
        run([GOOD, *[LONG] * 5])
    assert "  5 x over_long, the first 3:" in str(caught.value)
    assert str(caught.value).count("pairs.jsonl:") == 3


def test_rows_that_are_left_out_are_no_reason_to_refuse(run: Any) -> None:
    rows = [GOOD, LONG, {}]
    with pytest.raises(DataError, match=r"pairs\.jsonl:3: no column") as caught:
        run(rows, truncation_mode="drop")
    assert "over_long" not in str(caught.value)


def test_where_nothing_is_left_the_first_ones_are_named(run: Any) -> None:
    with pytest.raises(DataError, match=r"none of the 2 rows of .* can be used \(missing_column: 2\); ") as caught:
        run([{"text": "x"}, {"text": "y"}], on_bad_row="skip")
    assert "pairs.jsonl:1: no column chosen (the row has text)" in str(caught.value)


def test_rows_of_several_sources_in_one_message(tmp_path: Path) -> None:
    sources = []
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(line_of(GOOD) + "\n{}\n")
        sources.append(DataSource(path=str(tmp_path / f"{name}.jsonl")))
    spec = save_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(DataError, match=r"^data\.train: 2 of 4 rows cannot be used") as caught:
        prepare_dataset(sources, DataConfig(train=sources), spec, tmp_path / "cache")
    assert "a.jsonl:2: " in str(caught.value) and "b.jsonl:2: " in str(caught.value)


@pytest.mark.parametrize("place", [0, 1])
def test_a_source_without_a_usable_row_is_an_error_beside_others(tmp_path: Path, place: int) -> None:
    spec = save_tokenizer(tmp_path / "tokenizer")
    rows = [[GOOD, GOOD], [{**GOOD, "rejected": "yes"}]]
    sources = []
    for k, one in enumerate(rows if place else reversed(rows)):
        (tmp_path / f"{k}.jsonl").write_text("".join(line_of(row) + "\n" for row in one))
        sources.append(DataSource(path=str(tmp_path / f"{k}.jsonl")))
    data = DataConfig(train=sources, on_bad_row="skip")
    with pytest.raises(DataError, match=rf"data.train.{place}: none of the 1 rows of .* \(identical_completions: 1\)"):
        prepare_dataset(sources, data, spec, tmp_path / "cache")


def test_ratings_of_another_source_hide_no_source_without_a_usable_row(tmp_path: Path) -> None:
    spec, sources = save_tokenizer(tmp_path / "tokenizer"), []
    rated = [{"prompt": "p", "completion": text, "label": text == "a"} for text in "ab"]
    for k, one in enumerate([rated, [{**GOOD, "rejected": "yes"}]]):
        (tmp_path / f"{k}.jsonl").write_text("".join(line_of(row) + "\n" for row in one))
        sources.append(DataSource(path=str(tmp_path / f"{k}.jsonl")))
    with pytest.raises(DataError, match=r"data.train.1: none of the 1 rows"):
        prepare_dataset(sources, DataConfig(train=sources, on_bad_row="skip"), spec, tmp_path / "cache")


def test_a_file_that_breaks_off_is_never_skipped(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl.gz"
    rows = "".join(line_of({**GOOD, "rejected": str(n) * 50}) + "\n" for n in range(500))
    path.write_bytes(gzip.compress(rows.encode())[:-500])
    source = DataSource(path=str(path))
    spec = save_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(DataError, match="cannot be read from here on"):
        prepare_dataset([source], DataConfig(train=[source], on_bad_row="skip"), spec, tmp_path / "cache")


def test_an_error_of_a_row_can_be_pickled() -> None:
    error = pickle.loads(pickle.dumps(RowError("f:1: no column", MISSING_COLUMN)))
    assert (str(error), error.reason) == ("f:1: no column", MISSING_COLUMN)
