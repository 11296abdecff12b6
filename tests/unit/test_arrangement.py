"""Micro-batches of arrays, held against ones that grow token by token, to the last bit and dtype."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dpo_dist.batch import MicroBatch, build_micro_batch
from dpo_dist.data import Pair
from dpo_dist.tokenization import TokenizedExample
from dpo_dist.tokenization.turns import given
from tests.unit.grown_micro_batch import grown_micro_batch

SEEDS = range(60)


def _examples(seed: int, given_tokens: bool) -> list[TokenizedExample]:
    """A few, of every kind there is: pairs, demonstrations, rated; short ones more often than long ones."""
    draw = np.random.default_rng(seed)

    def ids(longest: int) -> tuple[int, ...]:
        return tuple(draw.integers(0, 128_000, int(draw.integers(1, longest))).tolist())

    def completion() -> tuple[int, ...]:
        whole = ids(12)
        return tuple(given(token) if given_tokens and draw.random() < 0.4 else token for token in whole)

    found = []
    for number in range(int(draw.integers(1, 7))):
        completions = tuple(completion() for _ in range(int(draw.integers(1, 6))))
        places = [(a, b) for a in range(len(completions)) for b in range(len(completions)) if a != b]
        kind = draw.choice(["pairs", "demonstrations", "rated"])
        chosen = places if kind == "pairs" else []
        pairs = tuple(Pair(a, b, *draw.random(3).tolist()) for a, b in chosen if draw.random() < 0.5)
        ratings = tuple((draw.random(len(completions)) < 0.5).tolist()) if kind == "rated" else ()
        one = TokenizedExample(ids(9), completions, pairs, f"a:{number}", float(draw.random()))
        found.append(replace(one, ratings=ratings, entry=int(draw.integers(3))))
    return found


def assert_equal(found: MicroBatch, expected: MicroBatch) -> None:
    for ours, theirs in ((found, expected), (found.layout, expected.layout)):
        assert vars(ours).keys() == vars(theirs).keys()
        for name, value in vars(theirs).items():
            mine = getattr(ours, name)
            assert type(mine) is type(value), name
            if isinstance(value, torch.Tensor):
                assert mine.dtype == value.dtype and mine.shape == value.shape and torch.equal(mine, value), name
            elif name != "layout":
                assert mine == value, name


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("given_tokens", [True, False])
@pytest.mark.parametrize("ld_alpha", [None, 0.3])
def test_arrays_and_lists_come_to_the_same(share: bool, given_tokens: bool, ld_alpha: float | None) -> None:
    one_token = 0
    for seed in SEEDS:
        examples = _examples(seed, given_tokens)
        offsets = np.random.default_rng(seed).integers(0, 1000, len(examples)).tolist()
        found = build_micro_batch(examples, offsets, share, ld_alpha)
        assert_equal(found, grown_micro_batch(examples, offsets, share, ld_alpha))
        one_token += sum(len(ids) == 1 for example in examples for ids in example.completion_ids)
    assert one_token > len(SEEDS)


@pytest.mark.parametrize("ld_alpha", [None, 0.3])
def test_a_filler(ld_alpha: float | None) -> None:
    assert_equal(build_micro_batch([], [], True, ld_alpha), grown_micro_batch([], [], True, ld_alpha))


def test_nothing_learned_at_all() -> None:
    example = TokenizedExample((1, 2), ((given(3), given(4)), (given(5),)), (Pair(0, 1),), "a:1")
    for ld_alpha in (None, 0.3):
        expected = grown_micro_batch([example], [0], True, ld_alpha)
        assert_equal(build_micro_batch([example], [0], True, ld_alpha), expected)


def test_two_micro_batches_have_no_memory_in_common() -> None:
    first, second = build_micro_batch([], [], True), build_micro_batch([], [], True)
    first.input_ids_T[0] = 7
    first.position_ids_T[0] = 7
    assert (second.input_ids_T.tolist(), second.position_ids_T.tolist()) == ([0, 0], [0, 1])
