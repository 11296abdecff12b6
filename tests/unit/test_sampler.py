"""Which examples form a step: held to what one pass over a list would give."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_dist.sampler import Sampler

SIZES = {"num_examples": st.integers(1, 60), "examples_per_step": st.integers(1, 70), "seed": st.integers(0, 2**63 - 1)}


@given(**SIZES, shuffle=st.booleans())
def test_every_epoch_holds_every_example_once(
    num_examples: int, examples_per_step: int, seed: int, shuffle: bool
) -> None:
    sampler = Sampler(num_examples, examples_per_step, seed, shuffle)
    assert sampler.steps_per_epoch == len(range(0, num_examples, examples_per_step))
    seen = 0
    for epoch in range(3):
        steps = range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch)
        rows: list[int] = []
        for step in steps:
            assert sampler.examples_seen(step) == seen
            examples = sampler.examples_of(step)
            is_last = step == steps[-1]
            assert 0 < len(examples) <= examples_per_step
            assert is_last or len(examples) == examples_per_step
            seen += len(examples)
            rows += examples
        assert sorted(rows) == list(range(num_examples))
        assert shuffle or rows == list(range(num_examples))
    assert sampler.examples_seen(3 * sampler.steps_per_epoch) == seen == 3 * num_examples


@given(**SIZES, step=st.integers(0, 10_000))
def test_resuming_is_arithmetic(num_examples: int, examples_per_step: int, seed: int, step: int) -> None:
    """A sampler that has never been asked for an earlier step gives the same one."""
    asked = Sampler(num_examples, examples_per_step, seed, shuffle=True)
    for earlier in range(max(0, step - 3), step):
        asked.examples_of(earlier)
    assert asked.examples_of(step) == Sampler(num_examples, examples_per_step, seed, shuffle=True).examples_of(step)


def test_every_epoch_and_every_seed_has_its_own_order() -> None:
    orders = [
        Sampler(100, 100, seed, shuffle=True).examples_of(epoch)
        for seed, epoch in itertools.product(range(4), range(4))
    ]
    assert len(set(orders)) == len(orders)
    assert tuple(range(100)) not in orders
    # Unrelated permutations of 100 agree in one place on average.
    agreements = [sum(a == b for a, b in zip(x, y, strict=True)) for x, y in itertools.combinations(orders, 2)]
    assert sum(agreements) / len(agreements) < 1.5


def test_order_of_a_seed_is_pinned() -> None:
    """A resumed run draws the order again: a numpy that draws another one would repeat and drop examples in silence."""
    sampler = Sampler(12, 5, seed=42, shuffle=True)
    assert [sampler.examples_of(step) for step in range(6)] == [
        *[(0, 7, 6, 9, 11), (3, 5, 2, 4, 10), (1, 8)],
        *[(0, 7, 4, 9, 8), (3, 1, 2, 10, 6), (5, 11)],
    ]


@pytest.mark.parametrize(
    ("epochs", "steps"), [(1.0, 10), (2.0, 20), (0.5, 5), (0.01, 1), (1.01, 11), (1.1, 11), (0.3, 3), (2.7, 27)]
)
def test_number_of_steps_is_rounded_up(epochs: float, steps: int) -> None:
    """transformers' ceil(epochs * steps per epoch), without the rounding of 1.1 * 10 = 11.000000000000002."""
    assert Sampler(97, 10, seed=0, shuffle=False).num_steps(epochs) == steps
