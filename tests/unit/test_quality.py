"""What is wrong with preference pairs: held against the definitions, on random pairs; and as `check` tells it."""

import random
from pathlib import Path

import numpy as np
import pytest

from dpo_dist.cli.data_quality import describe_leaks, describe_quality
from dpo_dist.data import Pair
from dpo_dist.quality import digests, find_faults, share_of_longer
from dpo_dist.tokenization import TokenizedDataset, TokenizedExample
from tests.stored_rows import save_dataset


def reaches(edges: set[tuple[int, int]], start: int, goal: int) -> bool:
    """Whether a way of at least no step leads from one to the other."""
    known, grown = set[int](), {start}
    while grown != known:
        known, grown = grown, grown | {worse for better, worse in edges if better in grown}
    return goal in known


@pytest.mark.parametrize("seed", range(60))
def test_repeated_and_contradicting_pairs_are_those_of_the_definition(seed: int) -> None:
    chance = random.Random(seed)
    nodes, number = chance.randrange(2, 12), chance.randrange(0, 25)
    pairs = [tuple(chance.sample(range(nodes), 2)) for _ in range(number)]
    chosen, rejected = (np.array([pair[side] for pair in pairs], dtype=np.int64) for side in (0, 1))
    found = find_faults(chosen, rejected)
    assert found.repeated.tolist() == [place for place, pair in enumerate(pairs) if pair in pairs[:place]]
    on_circle = [place for place, (better, worse) in enumerate(pairs) if reaches(set(pairs), worse, better)]
    assert found.contradicting.tolist() == on_circle


def test_a_pair_between_two_circles_is_none_of_them() -> None:
    chosen, rejected = np.array([0, 1, 1, 2, 3]), np.array([1, 0, 2, 3, 2])
    assert find_faults(chosen, rejected).contradicting.tolist() == [0, 1, 3, 4]


@pytest.mark.parametrize(("lengths", "share"), [([(3, 1), (1, 2), (4, 4), (9, 2)], 2 / 3), ([(2, 2)], None)])
def test_share_of_longer(lengths: list[tuple[int, int]], share: float | None) -> None:
    chosen, rejected = (np.array(side) for side in zip(*lengths, strict=True))
    assert share_of_longer(chosen, rejected) == share


def test_digests_tell_sequences_apart_wherever_they_lie() -> None:
    ids, starts = np.array([1, 2, 3, 1, 2, 3, 1, 2], dtype=np.int32), np.array([0, 3, 6, 8, 8])
    found = [tuple(row) for row in digests(ids, starts).tolist()]
    assert found[0] == found[1] and len(set(found)) == 3
    assert [tuple(row) for row in digests(ids[3:], np.array([0, 3])).tolist()] == found[:1]


# ---- as it is told


def example(row: int, prompt: int, chosen: int, rejected: int, longer: int = 0) -> TokenizedExample:
    """A pair of completions that begin with those ids."""
    completions = ((chosen, *[7] * (2 + longer)), (rejected, 7, 7))
    return TokenizedExample((prompt, 5), completions, (Pair(0, 1),), f"pairs.jsonl:{row}")


def dataset(folder: Path, *examples: TokenizedExample) -> TokenizedDataset:
    return save_dataset(folder, list(examples))


def test_planted_faults_are_told_and_none_of_a_clean_set(tmp_path: Path) -> None:
    clean = dataset(tmp_path / "clean", *(example(row, row, 100, 200, longer=row % 2) for row in range(1, 9)))
    assert describe_quality(clean) == [
        "8 pairs of 8 different prompts; chosen is the longer one in 100% of those that differ in length",
        "note: the longer completion is chosen so often that a model may learn the length instead of the quality; "
        "rewards/accuracies do not tell the two apart (loss_type=sigmoid_norm averages over tokens)",
    ]
    planted = [example(row, row, 100, 200) for row in range(1, 6)]
    planted += [example(6, 1, 100, 200), example(7, 2, 200, 100), example(8, 6, 100, 200)]
    assert describe_quality(dataset(tmp_path / "planted", *planted)) == [
        "8 pairs of 6 different prompts",
        "note: 1 pair said before, as in pairs.jsonl:6",
        "note: 2 pairs contradict each other, as in pairs.jsonl:2, pairs.jsonl:7",
    ]


@pytest.mark.parametrize(
    ("num_longer", "kind"), [(0, "shorter"), (2, "shorter"), (3, None), (5, None), (6, "longer"), (8, "longer")]
)
def test_only_lopsided_lengths_are_remarked_on(tmp_path: Path, num_longer: int, kind: str | None) -> None:
    lopsided = [example(row, row, 100, 200, longer=1 if row < num_longer else -1) for row in range(8)]
    first, *notes = describe_quality(dataset(tmp_path / "set", *lopsided))
    assert f"chosen is the longer one in {num_longer / 8:.0%} of those" in first
    assert [note.split(" completion")[0] for note in notes] == ([f"note: the {kind}"] if kind else [])


def test_pairs_lie_where_the_examples_say(tmp_path: Path) -> None:
    """In more than one batch of the file."""
    examples = [
        TokenizedExample((row + 1,), ((3,), (4,), (5,)), (Pair(2, 0), Pair(row % 2, 2))[: row % 3], f"a.jsonl:{row}")
        for row in range(2500)
    ]
    saved = dataset(tmp_path / "many", *examples)
    expected = [
        (row, 3 * row + pair.chosen, 3 * row + pair.rejected) for row in range(2500) for pair in examples[row].pairs
    ]
    assert list(zip(*(column.tolist() for column in saved.pair_columns()), strict=True)) == expected


def test_demonstrations_have_no_pairs_to_judge(tmp_path: Path) -> None:
    demonstration = TokenizedExample((1, 2), ((3, 4),), (), "a.jsonl:1")
    assert describe_quality(dataset(tmp_path / "one", demonstration)) == []


def test_prompts_on_both_sides_are_told(tmp_path: Path) -> None:
    sets = {
        "data.train": dataset(tmp_path / "train", *(example(row, row, 100, 200) for row in range(1, 5))),
        "data.evaluation.0": dataset(tmp_path / "clean", example(1, 50, 100, 200)),
        "data.evaluation.1": dataset(tmp_path / "leaking", example(1, 60, 1, 2), example(2, 3, 8, 9)),
    }
    assert describe_leaks(sets) == [
        "data.evaluation.1: the prompt of 1 example of 2 is trained on too, as in pairs.jsonl:2; what they measure is "
        "not new to the model"
    ]
