"""What a row is read as when it has the columns of several kinds, and hostile numbers: found, never a traceback."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_dist.cli.checking import _shown_completions
from dpo_dist.config import DataConfig, DataSource
from dpo_dist.data import Pair, PreferenceExample, RowFault
from dpo_dist.data.columns import ignored_columns
from dpo_dist.data.rows import parse_row
from dpo_dist.errors import DataError
from dpo_dist.tokenization import TokenizedDataset, TokenizedExample, TokenizerSpec, prepare_dataset
from tests.byte_tokenizer import save_tokenizer

USER = {"role": "user", "content": "Hi"}
A, B, C = ({"role": "assistant", "content": text} for text in "ABC")
PAIR = {"prompt": "Q", "chosen": "a", "rejected": "b"}
RANKED = {"prompt": "Q", "completions": ["x", "y"], "scores": [1, 2]}
# As published: `messages` repeats what was chosen, here something else, so that it shows which is read.
ULTRAFEEDBACK = {
    "prompt": "Hi",
    "prompt_id": "7",
    "chosen": [USER, A],
    "rejected": [USER, B],
    "messages": [USER, C],
    "score_chosen": 8.0,
    "score_rejected": 3.0,
}


def parsed(row: dict[str, Any], demonstrations: bool = False) -> PreferenceExample:
    example = parse_row(row, "f:1", demonstrations=demonstrations)
    assert isinstance(example, PreferenceExample), example
    return example


# ---- which columns are read, and that the others are named


@pytest.mark.parametrize(
    ("row", "completions", "best", "ignored"),
    [
        ({**PAIR, **RANKED}, ("a", "b"), "a", {"completions", "scores"}),
        ({**PAIR, "completions": [{"model": "m", "response": "r"}]}, ("a", "b"), "a", {"completions"}),
        ({**PAIR, "completion": "z", "label": False}, ("a", "b"), "a", {"completion", "label"}),
        ({**RANKED, "completion": "z"}, ("x", "y"), "y", {"completion"}),
        (ULTRAFEEDBACK, ((A,), (B,)), (A,), {"messages", "prompt_id", "score_chosen", "score_rejected"}),
    ],
)
def test_chosen_and_rejected_come_first_in_both_kinds_of_run(
    row: dict[str, Any], completions: tuple[Any, ...], best: Any, ignored: set[str]
) -> None:
    assert parsed(row).completions == completions
    assert ignored_columns(row) == ignored
    assert parsed(row, demonstrations=True).completions == (best,)
    assert ignored_columns(row, demonstrations=True) == ignored


@pytest.mark.parametrize(
    ("row", "ignored"),
    [
        ({"messages": [USER, A], "label": 1}, set()),
        ({"prompt": "Hi", "messages": [USER, A]}, {"prompt"}),
        ({"conversations": [USER, A], "weight": 2.0}, set()),
        ({**RANKED, "margin": 1.0, "chosen_probability": 0.5}, {"margin", "chosen_probability"}),
        ({**PAIR, "margin": 1.0, "chosen_probability": 0.5}, {"margin", "chosen_probability"}),
        ({"prompt_ids": [1], "completions_ids": [[2], [3]], "ranks": [2, 1]}, set()),
        ({"prompt_ids": [1], "completion_ids": [2], "completion": "z"}, {"completion"}),
    ],
)
def test_what_a_supervised_run_does_not_read_is_named(row: dict[str, Any], ignored: set[str]) -> None:
    parsed(row, demonstrations=True)
    assert ignored_columns(row, demonstrations=True) == ignored


def test_one_schema_for_rows_of_several_kinds(tmp_path: Path) -> None:
    """Parquet gives every row every column: null ones are not named, for other rows of the file fill them."""
    spec = save_tokenizer(tmp_path / "tokenizer")
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([{**PAIR, "completions": None, "scores": None, "id": 3}, RANKED]), path)
    source = DataSource(path=str(path))
    dataset = prepare_dataset([source], DataConfig(train=[source]), spec, tmp_path / "cache")
    assert [example.pairs for example in dataset] == [(Pair(0, 1),), (Pair(1, 0, 1.0, 1.0),)]
    assert dataset.preferences.num_ranked == 1
    assert dataset.ignored_columns == ("id",)


@pytest.mark.parametrize(
    ("row", "demonstrations", "column"),
    [
        ({"prompt": "Q", "completions": None, "scores": [1, 2]}, False, "completions"),
        ({"prompt": "Q", "completions": None, "scores": [1, 2]}, True, "completions"),
        ({"messages": None}, True, "messages"),
        ({"conversations": None}, True, "conversations"),
        ({"prompt": "Q", "completion": None, "label": True}, True, "completion"),
        ({"conversations": [USER, C], "chosen": None, "rejected": B}, True, "chosen"),
    ],
)
def test_a_null_is_a_fault_of_its_row(row: dict[str, Any], demonstrations: bool, column: str) -> None:
    fault = parse_row(row, "f:1", demonstrations=demonstrations)
    assert isinstance(fault, RowFault)
    assert (fault.reason, fault.what) == ("missing_value", f"{column} is null")


def test_a_supervised_run_refuses_bad_completions_as_token_ids_too() -> None:
    row = {"prompt_ids": [1], "completion_ids": [2], "label": False}
    with pytest.raises(DataError, match=r"f:1: label=False: a supervised run learns every completion"):
        parse_row(row, "f:1", demonstrations=True)


# ---- hostile numbers


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({**PAIR, "weight": 10**400}, "weight=inf is not finite"),
        ({**PAIR, "margin": -(10**400)}, "margin=-inf is not finite"),
        ({**RANKED, "scores": [1, 10**400]}, "scores[1]=inf is not finite"),
        ({**RANKED, "scores": [1e308, -1e308]}, "scores lie too far apart"),
        # Told from its size: as many whole numbers as that fit into no memory.
        ({**RANKED, "scores": None, "ranks": [1, 10**12]}, "ranks=[1, 1000000000000] is not a ranking"),
    ],
)
def test_numbers_beyond_what_a_float_holds(row: dict[str, Any], error: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_row(row, "f:1")
    assert str(caught.value).startswith(f"f:1: {error}")


def test_the_order_of_a_messages_keys_makes_no_other_completion() -> None:
    turned = dict(reversed(A.items()))
    row = {"prompt": [USER], "completions": [A, turned, B], "scores": [2, 2, 1]}
    assert parsed(row).pairs == (Pair(0, 1, 1.0, 1.0),)
    fault = parse_row({**row, "scores": [2, 3, 1]}, "f:1")
    assert isinstance(fault, RowFault)
    assert fault.reason == "identical_completions"
    assert fault.what == "completion 1 is identical to completion 0, which is ranked otherwise"


# ---- merged by prompt


def test_demonstrations_of_one_prompt_are_not_merged(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt_ids": [1], "completion_ids": [k]} for k in (2, 3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = DataSource(path=str(path))
    data = DataConfig(train=[source], group_by_prompt=True)
    dataset = prepare_dataset([source], data, TokenizerSpec("/nowhere"), tmp_path / "cache", demonstrations=True)
    assert isinstance(dataset, TokenizedDataset)
    assert [example.completion_ids for example in dataset] == [((2,),), ((3,),)]
    assert dataset.notes == {}


# ---- shown by `dpo-dist check`


@pytest.mark.parametrize(
    ("pairs", "order"),
    [
        ([], [0, 1, 2, 3, 4]),  # a demonstration has one; all that there are
        ([(4, 3), (3, 0), (3, 1), (3, 2)], [4, 3, 0, 1]),  # neighbours only: the second best wins most often
        ([(0, 1), (0, 2), (0, 3), (0, 4)], [0, 1, 2, 3]),
        ([(0, 1), (1, 0), (1, 2), (2, 3), (3, 4)], None),  # rows that contradict each other: it ends
    ],
)
def test_the_sample_shows_the_best_in_order(pairs: list[tuple[int, int]], order: list[int] | None) -> None:
    example = TokenizedExample((1,), tuple((k,) for k in range(5)), tuple(Pair(*pair) for pair in pairs), "f:1")
    shown = [index for _, index in _shown_completions(example)]
    assert len(set(shown)) == len(shown) == (4 if pairs else 5)
    assert order is None or shown == order


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_a_supervised_run_learns_no_conversation_that_is_called_bad(column: str) -> None:
    row = {column: [USER, A], "label": False}
    with pytest.raises(DataError, match=r"f:1: label=False: a supervised run learns every completion"):
        parse_row(row, "f:1", demonstrations=True)
    rated = parsed(row)
    assert (rated.rating, rated.completions) == (False, ((A,),))
    assert ignored_columns(row) == ignored_columns(row, demonstrations=True) == set()
