"""Rows of one completion that is called good or bad (KTO): paired by prompt, and counted where they cannot be."""

import csv
import json
import random
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.config import DataConfig, DataSource, Rated
from dpo_dist.data import RowFault
from dpo_dist.data.rows import parse_row
from dpo_dist.errors import DataError
from dpo_dist.tokenization import TokenizedDataset, load_tokenizer, prepare_dataset
from tests.byte_tokenizer import save_tokenizer


def rated(prompt: str, completion: str, label: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, "label": label}


@pytest.fixture
def run(tmp_path: Path) -> Any:
    spec = save_tokenizer(tmp_path / "tokenizer")

    def tokenized(rows: list[Any] | Path, rated: Rated = "paired", **settings: Any) -> TokenizedDataset:
        path = rows if isinstance(rows, Path) else tmp_path / "rows.jsonl"
        if not isinstance(rows, Path):
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        data = DataConfig(train=[DataSource(path=str(path))], **settings)
        return prepare_dataset(data.train, data, spec, tmp_path / "cache", rated=rated)

    tokenized.tokenizer = load_tokenizer(spec)  # pyright: ignore[reportFunctionMemberAccess]
    return tokenized


def said(run: Any, dataset: TokenizedDataset) -> dict[str, set[tuple[str, str]]]:
    """(better, worse) of every prompt, as text."""

    def text(ids: Any) -> str:
        return run.tokenizer.decode(ids, skip_special_tokens=True)

    examples = [dataset[k] for k in range(len(dataset))]
    assert len({example.prompt_ids for example in examples}) == len(examples)
    return {
        text(one.prompt_ids): {
            (text(one.completion_ids[pair.chosen]), text(one.completion_ids[pair.rejected])) for pair in one.pairs
        }
        for one in examples
    }


def test_good_ones_over_bad_ones_of_the_same_prompt(run: Any) -> None:
    rows = [
        rated("p", "good", True),
        rated("q", "only good", True),
        rated("p", "bad", False),
        rated("r", "only bad", False),
        rated("p", "worse", False),
        rated("p", "good", True),  # said twice
        rated("s", "both", True),
        rated("s", "both", False),
        {"prompt": "t", "chosen": "yes", "rejected": "no"},
    ]
    dataset = run(rows)
    assert said(run, dataset) == {"t": {("yes", "no")}, "p": {("good", "bad"), ("good", "worse")}}
    assert dataset.bad_rows == {"unpaired": 4}
    assert dataset.source_of(1).endswith("rows.jsonl:1")


def test_every_good_one_over_every_bad_one_of_any_rows(run: Any) -> None:
    draw = random.Random(0)
    rows = [rated(f"p{draw.randrange(20)}", f"c{draw.randrange(6)}", draw.random() < 0.5) for _ in range(300)]
    kinds: dict[str, dict[str, set[bool]]] = {}
    for row in rows:
        kinds.setdefault(row["prompt"], {}).setdefault(row["completion"], set()).add(row["label"])
    expected = {}
    for prompt, ratings in kinds.items():
        good, bad = ([c for c, found in ratings.items() if found == {kind}] for kind in (True, False))
        if pairs := set(product(good, bad)):
            expected[prompt] = pairs
    dataset = run(rows)
    assert said(run, dataset) == expected
    paired = {(prompt, end) for prompt, pairs in expected.items() for pair in pairs for end in pair}
    assert dataset.bad_rows["unpaired"] == sum((row["prompt"], row["completion"]) not in paired for row in rows) > 0
    assert len(said(run, run(rows, pairing="best_vs_worst"))["p0"]) == 1


def test_messages_token_ids_and_csv(run: Any, tmp_path: Path) -> None:
    chat = [
        rated([{"role": "user", "content": "Hi"}], [{"role": "assistant", "content": text}], label)  # pyright: ignore
        for text, label in (("Hello!", True), ("What?", False))
    ]
    assert [len(example.pairs) for example in [run(chat)[0]]] == [1]
    ids = [{"prompt_ids": [9], "completion_ids": [k], "label": k > 5} for k in (5, 6)]
    assert run(ids)[0].completion_ids == ((5,), (6,)) and run(ids)[0].pairs[0].chosen == 1
    with (tmp_path / "rows.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerows([["prompt", "completion", "label"], ["p", "a", True], ["p", "b", False], ["p", "c", 0]])
    assert said(run, run(tmp_path / "rows.csv")) == {"p": {("a", "b"), ("a", "c")}}


def test_they_are_merged_with_pairs_of_their_prompt(run: Any) -> None:
    rows = [rated("p", "a", True), rated("p", "b", False), {"prompt": "p", "chosen": "a", "rejected": "c"}]
    assert len(run(rows)) == 2
    assert said(run, run(rows, group_by_prompt=True)) == {"p": {("a", "b"), ("a", "c")}}


def test_they_are_paired_across_all_entries(tmp_path: Path) -> None:
    """Two versions of feedback: the thumb up is in one, the thumb down in the other."""
    spec, sources = save_tokenizer(tmp_path / "tokenizer"), []
    for name, rows in (("a", [rated("p", "good", True)]), ("b", [rated("p", "bad", False), rated("q", "x", True)])):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources.append(DataSource(path=str(path)))
    dataset = prepare_dataset(sources, DataConfig(train=sources), spec, tmp_path / "cache")
    assert (len(dataset), dataset.bad_rows) == (1, {"unpaired": 1})


@pytest.mark.parametrize("pairing", ["all", "best_vs_rest", "best_vs_worst", "adjacent"])
def test_what_the_pairing_passes_over_is_not_unpaired(run: Any, pairing: str) -> None:
    rows = [rated("p", text, text < "c") for text in "abcd"]
    dataset = run(rows, pairing=pairing)
    assert (len(dataset), dataset.bad_rows) == (1, {})


def test_two_kinds_are_no_ranking(run: Any) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:1: data.pairing=list asks for rankings"):
        run([rated("p", "a", True), rated("p", "b", False)], pairing="list")


def test_they_are_not_shortened(run: Any) -> None:
    """Each would lose another part of the prompt that they have in common."""
    rows = [rated("word " * 9 + "Q:", " good good", True), rated("word " * 9 + "Q:", " bad", False)]
    short = [rated("Q:", " a", True), rated("Q:", " b", False)]
    dataset = run([*rows, *short], max_length=40, truncation_mode="keep_end_of_prompt")
    assert (len(dataset), dataset.bad_rows) == (1, {"over_long": 2})


def test_truth_values_of_a_spreadsheet(run: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,completion,label\np,a,TRUE\np,b,FALSE\np,c,false\n")
    assert said(run, run(tmp_path / "rows.csv")) == {"p": {("a", "b"), ("a", "c")}}


def test_where_nothing_can_be_paired(run: Any) -> None:
    with pytest.raises(DataError, match=r"none of the 2 rows .* can be used \(unpaired: 2\)"):
        run([rated("p", "a", True), rated("q", "b", False)])


@pytest.mark.parametrize(
    ("changes", "reason", "what"),
    [
        ({"label": "good"}, "wrong_number", "label='good' is neither true nor false"),
        ({"label": 2}, "wrong_number", "label=2 is neither"),
        ({"label": None}, "no_preference", "the row is a demonstration"),
        ({"weight": 2}, "unread_column", "weight belongs to a pair"),
        ({"completion": None}, "missing_value", "completion is null"),
        ({"completion": " "}, "empty_completion", "the completion is empty"),
    ],
)
def test_faults_of_rated_rows(changes: dict[str, Any], reason: str, what: str) -> None:
    try:
        found = parse_row({**rated("p", "a", True), **changes}, "f:1")
    except DataError as error:
        assert getattr(error, "reason", "") == reason
        assert what in str(error)
    else:
        assert isinstance(found, RowFault)
        assert (found.reason, what in found.what) == (reason, True)


def test_the_rest_is_kept_beside_pairs(run: Any) -> None:
    rows = [
        rated("p", "good", True),
        rated("q", "only good", True),
        rated("p", "bad", False),
        rated("r", "only bad", False),
        rated("r", "only bad", False),  # said twice: twice as much
        rated("s", "both", True),
        rated("s", "both", False),
        rated("s", "worse", False),
    ]
    dataset = run(rows, rated="rest")
    found = [
        (run.tokenizer.decode(one.completion_ids[0], skip_special_tokens=True), len(one.pairs), one.ratings)
        for one in dataset
    ]
    singles = [("only good", 0, (True,)), ("only bad", 0, (False,)), ("only bad", 0, (False,)), ("worse", 0, (False,))]
    assert found == [("good", 1, ()), *singles]
    assert dataset.bad_rows == {"unpaired": 2}
    counts = dataset.preferences
    assert (counts.num_pairs, counts.num_rated, counts.num_desirable) == (1, 4, 1)


def test_nothing_is_paired_where_only_ratings_are_read(run: Any) -> None:
    ranked = {"prompt": "t", "completions": ["best", "middle", "worst"], "scores": [3, 2, 1], "weight": 2}
    rows = [
        rated("p", "good", True),
        rated("p", "bad", False),
        {"prompt": "t", "chosen": "yes", "rejected": "no"},
        ranked,
        rated("p", "good", False),
    ]
    dataset = run(rows, rated="all")
    found = [
        ([run.tokenizer.decode(ids, skip_special_tokens=True) for ids in one.completion_ids], one.ratings, one.weight)
        for one in dataset
    ]
    assert found == [
        (["good"], (True,), 1.0),
        (["bad"], (False,), 1.0),
        (["yes", "no"], (True, False), 1.0),
        (["best", "worst"], (True, False), 2.0),  # the middle one is neither
        (["good"], (False,), 1.0),
    ]
    assert not any(one.pairs for one in dataset) and dataset.bad_rows == {}
    assert [one.source.rpartition(":")[2] for one in dataset] == ["1", "2", "3", "4", "5"]


def test_the_three_ways_are_three_data_sets(run: Any) -> None:
    rows = [rated("p", "good", True), rated("p", "bad", False), rated("q", "good", True)]
    kinds: list[Any] = ["paired", "rest", "all"]
    assert [len(run(rows, rated=kind)) for kind in kinds] == [1, 2, 3]
    assert len({run(rows, rated=kind).fingerprint for kind in kinds}) == 3
    other = [rated("p", "good", True), rated("p", "bad", False), rated("q", "good", False)]
    assert run(other, rated="all").fingerprint != run(rows, rated="all").fingerprint


@pytest.mark.parametrize("more", [{"margin": 2.0}, {"chosen_probability": 0.8}])
def test_what_a_pair_says_beyond_which_is_better_is_an_error(run: Any, more: dict[str, float]) -> None:
    rows = [{"prompt": "t", "chosen": "yes", "rejected": "no", **more}]
    with pytest.raises(DataError, match=r"rows.jsonl:1: the pair has a margin or a chosen_probability, and losses of"):
        run(rows, rated="all")
