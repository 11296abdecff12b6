"""Rows with many completions, and the numbers a row may carry: pairs, each completion once, and every mistake."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.config import DataConfig, DataSource
from dpo_dist.data import Pair, PreferenceExample, RowFault
from dpo_dist.data.ranked import preferences
from dpo_dist.data.rows import parse_row
from dpo_dist.errors import DataError
from dpo_dist.tokenization import TokenizedDataset, TokenizerSpec, prepare_dataset
from tests.byte_tokenizer import save_tokenizer

PAIRINGS = ("all", "best_vs_rest", "best_vs_worst", "adjacent", "list")
ROW = {"prompt": "Q", "completions": ["a", "b", "c"], "scores": [0.5, 2.0, 1.0]}
PAIR = {"prompt": "Q", "chosen": "a", "rejected": "b"}


def parsed(row: dict[str, Any], pairing: Any = "all") -> PreferenceExample:
    example = parse_row(row, "f:1", pairing)
    assert isinstance(example, PreferenceExample), example
    return example


def named(example: PreferenceExample) -> set[tuple[Any, Any]]:
    """Pairs as (better, worse) completions."""
    return {(example.completions[pair.chosen], example.completions[pair.rejected]) for pair in example.pairs}


# ---- which are compared


def oracle(values: list[float], pairing: str) -> set[tuple[int, int]]:
    """From the words of the documentation, two at a time."""
    places, best, worst = range(len(values)), max(values), min(values)
    found = set()
    for i in places:
        for j in places:
            between = any(values[j] < values[k] < values[i] for k in places)
            if values[i] <= values[j]:
                continue
            if pairing == "best_vs_rest" and values[i] != best:
                continue
            if pairing == "adjacent" and between:
                continue
            first_best, last_worst = values.index(best), max(k for k in places if values[k] == worst)
            if pairing == "best_vs_worst" and (i, j) != (first_best, last_worst):
                continue
            found.add((i, j))
    return found


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_pairs_of_any_scores(pairing: Any) -> None:
    draw = random.Random(7)
    for _ in range(300):
        values = [float(draw.randint(0, 4)) for _ in range(draw.randint(1, 6))]
        found = preferences(values, pairing)
        assert len(set(found)) == len(found)
        assert set(found) == oracle(values, pairing), values


@pytest.mark.parametrize(
    ("pairing", "pairs"),
    [
        ("all", {("b", "c"), ("b", "a"), ("c", "a")}),
        ("list", {("b", "c"), ("b", "a"), ("c", "a")}),
        ("best_vs_rest", {("b", "c"), ("b", "a")}),
        ("best_vs_worst", {("b", "a")}),
        ("adjacent", {("b", "c"), ("c", "a")}),
    ],
)
def test_a_row_of_three(pairing: str, pairs: set[tuple[str, str]]) -> None:
    for order in ({"scores": ROW["scores"]}, {"ranks": [3, 1, 2]}):
        example = parsed({"prompt": "Q", "completions": ["a", "b", "c"], **order}, pairing)
        assert named(example) == pairs
        assert len(example.completions) == len({end for pair in pairs for end in pair})  # what is not compared is left


def test_margins_are_differences_of_scores_and_weights_are_the_rows() -> None:
    example = parsed({**ROW, "weight": 2.5})
    margins = {(example.completions[p.chosen], example.completions[p.rejected]): p.margin for p in example.pairs}
    assert margins == {("b", "c"): 1.0, ("b", "a"): 1.5, ("c", "a"): 0.5}
    assert {pair.weight for pair in example.pairs} == {2.5} == {example.weight}
    ranked = parsed({"prompt": "Q", "completions": ["a", "b"], "ranks": [2, 1]})
    assert ranked.pairs == (Pair(1, 0),)


@pytest.mark.parametrize("ranks", [[1, 2, 3], [1, 1, 2], [1, 2, 2], [1, 1, 3], [2, 1, 2]])
def test_ranks_may_tie(ranks: list[int]) -> None:
    example = parsed({"prompt": "Q", "completions": ["a", "b", "c"], "ranks": ranks})
    order = dict(zip("abc", ranks, strict=True))
    assert named(example) == {(one, other) for one in "abc" for other in "abc" if order[one] < order[other]}


def test_the_same_completion_twice_is_one() -> None:
    example = parsed({"prompt": "Q", "completions": ["a", "b", "a"], "scores": [1, 2, 1]})
    assert example.completions == ("a", "b")
    assert named(example) == {("b", "a")}


MESSAGES = [{"role": "user", "content": "Q"}]
ANSWERS = [{"role": "assistant", "content": text} for text in ("A", "B", "C")]


@pytest.mark.parametrize(
    "completions", [ANSWERS, [[answer] for answer in ANSWERS], [[*MESSAGES, answer] for answer in ANSWERS]]
)
def test_completions_of_messages(completions: list[Any]) -> None:
    """Single ones, lists, or whole conversations."""
    row = {"prompt": MESSAGES, "completions": completions, "scores": [3, 2, 1], "system": "S"}
    example = parsed(row)
    assert example.prompt == ({"role": "system", "content": "S"}, *MESSAGES)
    assert example.completions == tuple((answer,) for answer in ANSWERS)


# ---- mistakes


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"scores": [1, 2]}, "scores has 2 values for 3 completions; give one for each"),
        ({"scores": None, "ranks": [1, 2, 3, 4]}, "ranks has 4 values for 3 completions"),
        ({"scores": [1, math.nan, 2]}, "scores[1]=nan is not finite"),
        ({"scores": [1, math.inf, 2]}, "scores[1]=inf is not finite"),
        ({"scores": [1, "2", 3]}, "scores[1]='2' is not a number"),
        ({"scores": [1, True, 3]}, "scores[1]=True is not a number"),
        ({"scores": 1.0}, "scores=1.0 is not a list"),
        ({"scores": None}, "completions come with neither scores nor ranks"),
        ({"ranks": [1, 2, 3]}, "completions come with both scores and ranks"),
        ({"scores": None, "ranks": [0, 1, 2]}, "ranks=[0, 1, 2] is not a ranking; give 1 for the best"),
        ({"scores": None, "ranks": [1, 3, 4]}, "ranks=[1, 3, 4] is not a ranking"),
        ({"scores": None, "ranks": [1, 1, 4]}, "ranks=[1, 1, 4] is not a ranking"),
        ({"scores": None, "ranks": [1, -2, 2]}, "ranks=[1, -2, 2] is not a ranking"),
        ({"scores": None, "ranks": [1, 2.5, 3]}, "ranks[1]=2.5 is not a whole number"),
        ({"scores": None, "ranks": [1, True, 2]}, "ranks[1]=True is not a whole number"),
        ({"completions": ["a"], "scores": [1]}, "completions has 1; give a list of two or more completions"),
        ({"completions": "abc"}, "completions is 'abc'; give a list of two or more"),
        ({"completions": ["a", ANSWERS, "c"]}, "completions[1] is not; give all columns of a row as strings"),
        ({"margin": 1.0}, "margin belongs to one pair, and the row holds completions"),
        ({"chosen_probability": 0.9}, "chosen_probability belongs to one pair"),
        ({"weight": 0}, "weight=0 is not above 0"),
        ({"weight": "2"}, "weight='2' is not a number"),
    ],
)
def test_faults_of_a_file(changes: dict[str, Any], error: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_row({**ROW, **changes}, "f:7")
    assert str(caught.value).startswith("f:7: ")
    assert error in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"scores": [1, None, 2]}, "missing_value"),
        ({"scores": None, "ranks": [1, None, 2]}, "missing_value"),
        ({"completions": ["a", None, "b"]}, "missing_value"),
        ({"scores": [1, 1, 1]}, "tied"),
        ({"completions": ["a", "b", "a"]}, "identical_completions"),
        ({"completions": ["a", " ", "c"]}, "empty_completion"),
        ({"prompt": ""}, "empty_prompt"),
    ],
)
def test_faults_of_a_row(changes: dict[str, Any], reason: str) -> None:
    fault = parse_row({**ROW, **changes}, "f:7")
    assert isinstance(fault, RowFault)
    assert fault.reason == reason


# ---- what a pair may say of itself


def test_labels_of_a_pair() -> None:
    example = parsed({**PAIR, "weight": 2, "margin": -0.5, "chosen_probability": 0.75})
    assert example.pairs == (Pair(0, 1, 2.0, -0.5, 0.75),)
    assert example.weight == 2.0
    nothing = {"weight": None, "margin": None, "chosen_probability": None}
    assert parsed({**PAIR, **nothing}).pairs == (Pair(0, 1),)


@pytest.mark.parametrize(
    ("column", "value", "error"),
    [
        ("chosen_probability", 0, "chosen_probability=0 is not a probability above 0"),
        ("chosen_probability", 1.1, "chosen_probability=1.1 is not a probability"),
        ("chosen_probability", math.nan, "chosen_probability=nan is not finite"),
        ("margin", math.inf, "margin=inf is not finite"),
        ("margin", [1], "margin=[1] is not a number"),
        ("weight", -1, "weight=-1 is not above 0"),
    ],
)
def test_mistakes_of_labels(column: str, value: Any, error: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_row({**PAIR, column: value}, "f:7")
    assert str(caught.value).startswith(f"f:7: {error}")


# ---- as token ids


@pytest.fixture
def spec(tmp_path: Path) -> TokenizerSpec:
    return save_tokenizer(tmp_path / "tokenizer")


def tokenized(tmp_path: Path, spec: TokenizerSpec, rows: list[Any], **settings: Any) -> TokenizedDataset:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = DataSource(path=str(path))
    return prepare_dataset([source], DataConfig(train=[source], **settings), spec, tmp_path / "cache")


def test_every_completion_is_stored_once_however_many_pairs_there_are(tmp_path: Path, spec: TokenizerSpec) -> None:
    rows = [{**ROW, "weight": 0.5}, {**PAIR, "margin": 2.0, "chosen_probability": 0.9}, PAIR]
    dataset = tokenized(tmp_path, spec, rows)
    assert [len(example.completion_ids) for example in dataset] == [3, 2, 2]
    assert [len(example.pairs) for example in dataset] == [3, 1, 1]
    assert dataset[1].pairs == (Pair(0, 1, 1.0, 2.0, 0.9),)
    assert dataset[0].pairs[0].weight == 0.5
    assert [example.weight for example in dataset] == [0.5, 1.0, 1.0] == dataset.weights.tolist()
    found = dataset.preferences
    assert (found.num_pairs, found.max_completions, found.num_ranked, found.num_weighted) == (5, 3, 1, 1)
    assert (found.num_margins, found.num_given_margins, found.num_soft_labels) == (4, 1, 1)


def test_rows_of_token_ids(tmp_path: Path, spec: TokenizerSpec) -> None:
    row = {"prompt_ids": [1, 2], "completions_ids": [[3], [4, 5], [6]], "ranks": [2, 1, 3]}
    example = tokenized(tmp_path, spec, [row])[0]
    assert (example.prompt_ids, example.completion_ids) == ((1, 2), ((3,), (4, 5), (6,)))
    assert {(pair.chosen, pair.rejected) for pair in example.pairs} == {(1, 0), (1, 2), (0, 2)}


def test_completions_that_are_cut_to_the_same_are_told_apart_no_more(tmp_path: Path, spec: TokenizerSpec) -> None:
    row = {"prompt": "Q", "completions": ["same words, then A", "same words, then B", "other"], "scores": [3, 2, 1]}
    with pytest.raises(DataError, match=r"identical within data\.max_length=12; raise"):
        tokenized(tmp_path, spec, [row], max_length=12, truncation_mode="keep_start")


@pytest.mark.parametrize(("column", "value"), [("weight", 2.0), ("chosen_probability", 0.5), ("margin", 1.0)])
def test_what_changes_the_loss_changes_the_fingerprint(
    tmp_path: Path, spec: TokenizerSpec, column: str, value: float
) -> None:
    plain = tokenized(tmp_path, spec, [PAIR]).fingerprint
    assert tokenized(tmp_path, spec, [{**PAIR, column: value}]).fingerprint != plain


def test_pairing_is_part_of_what_the_cache_is_found_by(tmp_path: Path, spec: TokenizerSpec) -> None:
    counts = [tokenized(tmp_path, spec, [ROW], pairing=pairing).preferences.num_pairs for pairing in PAIRINGS]
    assert counts == [3, 2, 1, 2, 3]
