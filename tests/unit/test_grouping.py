"""Rows of one prompt as one example."""

import itertools
import random
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.data import Pair
from dpo_dist.tokenization import TokenizerSpec, describe_notes
from tests.byte_tokenizer import save_tokenizer
from tests.unit.test_ranked_rows import tokenized


@pytest.fixture
def spec(tmp_path: Path) -> TokenizerSpec:
    return save_tokenizer(tmp_path / "tokenizer")


def row(prompt: int, chosen: int, rejected: int, **more: Any) -> dict[str, Any]:
    return {"prompt_ids": [prompt], "chosen_ids": [chosen], "rejected_ids": [rejected], **more}


def test_rows_of_one_prompt_become_one_example(tmp_path: Path, spec: TokenizerSpec) -> None:
    rows = [row(1, 10, 11), row(2, 10, 11), row(1, 10, 12, weight=2.0), row(1, 12, 11), row(3, 5, 6)]
    dataset = tokenized(tmp_path, spec, rows, group_by_prompt=True)
    assert [example.prompt_ids for example in dataset] == [(1,), (2,), (3,)]  # each at its first row's place
    assert dataset[0].completion_ids == ((10,), (11,), (12,))
    assert dataset[0].pairs == (Pair(0, 1), Pair(0, 2, 2.0), Pair(2, 1))
    assert dataset.notes == {"merged_by_prompt": 2}
    (note,) = describe_notes(dataset.notes, len(dataset))
    assert note.startswith(f"2 of {len(dataset) + 2} rows (")  # of the rows, not of the examples that they became
    assert dataset.source_of(0).endswith(":1")


def test_the_same_preference_twice_counts_twice_and_its_opposite_stays(tmp_path: Path, spec: TokenizerSpec) -> None:
    rows = [row(1, 10, 11), row(1, 11, 10), row(1, 10, 11, weight=0.5), row(1, 10, 11, margin=1.0)]
    (example,) = tokenized(tmp_path, spec, rows, group_by_prompt=True)
    assert example.completion_ids == ((10,), (11,))
    assert example.pairs == (Pair(0, 1, 1.5), Pair(1, 0), Pair(0, 1, 1.0, 1.0))


def test_ranked_rows_stay_as_they_are(tmp_path: Path, spec: TokenizerSpec) -> None:
    ranked = {"prompt_ids": [1], "completions_ids": [[10], [11], [12]], "ranks": [1, 2, 3]}
    dataset = tokenized(tmp_path, spec, [ranked, row(1, 10, 11), ranked], group_by_prompt=True)
    assert [len(example.pairs) for example in dataset] == [3, 1, 3]


def test_without_it_nothing_is_merged(tmp_path: Path, spec: TokenizerSpec) -> None:
    assert len(tokenized(tmp_path, spec, [row(1, 10, 11), row(1, 10, 12)])) == 2


@pytest.mark.parametrize("seed", range(5))
def test_every_preference_survives_with_its_weight(tmp_path: Path, spec: TokenizerSpec, seed: int) -> None:
    """The sum of weights of each (prompt, chosen, rejected), whatever is merged, and no completion stands twice."""
    draw = random.Random(seed)
    rows = [row(draw.randint(1, 3), *draw.sample(range(10, 14), 2), weight=draw.randint(1, 8) / 4) for _ in range(40)]
    wanted: dict[tuple[int, ...], float] = {}
    for one in rows:
        key = (one["prompt_ids"][0], one["chosen_ids"][0], one["rejected_ids"][0])
        wanted[key] = wanted.get(key, 0.0) + one["weight"]
    dataset = tokenized(tmp_path, spec, rows, group_by_prompt=True)
    found = {}
    for example, pair in itertools.chain.from_iterable(((e, p) for p in e.pairs) for e in dataset):
        ids = (example.prompt_ids[0], example.completion_ids[pair.chosen][0], example.completion_ids[pair.rejected][0])
        assert ids not in found
        found[ids] = pair.weight
    assert found == wanted
    assert all(len(set(example.completion_ids)) == len(example.completion_ids) for example in dataset)
