"""Near duplicates: held against likeness computed from its definition, on random texts."""

import random

import numpy as np
import pytest

from dpo_dist.near import NearIndex, common_shingles, likeness, shingles, without


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def runs(values: list[int]) -> set[tuple[int, ...]]:
    return {tuple(values[place : place + 3]) for place in range(len(values) - 2)}


@pytest.mark.parametrize("seed", range(20))
def test_likeness_is_that_of_the_definition(seed: int) -> None:
    chance = random.Random(seed)
    one = [chance.randrange(6) for _ in range(chance.randrange(3, 60))]
    other = [*one[: chance.randrange(1, len(one))], *(chance.randrange(6) for _ in range(9))]
    expected = len(runs(one) & runs(other)) / len(runs(one) | runs(other))
    assert likeness(shingles(ids(*one)), shingles(ids(*other))) == pytest.approx(expected)


def test_short_texts_are_one_shingle() -> None:
    assert likeness(shingles(ids(1, 2)), shingles(ids(1, 2))) == 1
    assert likeness(shingles(ids(1, 2)), shingles(ids(2, 1))) == 0
    assert len(shingles(ids())) == 0


@pytest.mark.parametrize("threshold", [0.5, 0.8, 1.0])
def test_near_texts_are_found_and_no_others(threshold: float) -> None:
    chance = random.Random(3)
    texts = [shingles(ids(*(chance.randrange(500) for _ in range(50)))) for _ in range(60)]
    index = NearIndex(threshold)
    for key, text in enumerate(texts):
        index.add(key, index.item(text))
    found = 0
    for key, text in enumerate(texts):
        for size in range(0, 48, 4):
            changed = np.sort(np.concatenate([text[size:], np.arange(size, dtype=np.uint32)]))
            is_near = likeness(text, changed) >= threshold
            assert index.find(index.item(changed)) == (key if is_near else None)
            found += is_near
    assert found > 50


def test_every_part_must_be_near() -> None:
    index = NearIndex(0.8)
    long, short, other = shingles(ids(*range(100))), shingles(ids(200, 201, 202)), shingles(ids(300, 301, 302))
    index.add(7, index.item(long, short))
    assert index.find(index.item(long, short)) == 7
    assert index.find(index.item(long, other)) is None
    assert index.find(index.item(short, long)) is None


def test_what_most_texts_have_tells_nothing() -> None:
    system = range(1000, 1040)
    texts = [shingles(ids(*system, *range(10 * row, 10 * row + 8))) for row in range(20)]
    assert likeness(texts[0], texts[1]) > 0.6
    bare = without(texts, common_shingles(texts))
    assert likeness(bare[0], bare[1]) == 0 and len(bare[0]) == 8
    assert len(common_shingles(texts[:15])) == 0
