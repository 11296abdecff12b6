"""Which examples form a step: held to what one pass over a list would give."""

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_dist.sampler import Sampler, _epoch_order, shuffled

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


# ---- large data sets, whose order is computed place by place


@given(**SIZES)
def test_computed_orders_hold_every_example_once(num_examples: int, examples_per_step: int, seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpo_dist.sampler.LISTED", 0)
        sampler = Sampler(num_examples, examples_per_step, seed, shuffle=True)
        for epoch in range(2):
            steps = range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch)
            rows = [row for step in steps for row in sampler.examples_of(step)]
            assert sorted(rows) == list(range(num_examples))


@pytest.mark.parametrize("num_examples", [2, 1000, 2**20 + 1, 3 * 10**6, 2**40 + 3])
def test_a_computed_order_looks_drawn(num_examples: int) -> None:
    """Means over 20,000 places, within five standard deviations: of a row, of a step from one place to the next."""
    count = min(num_examples, 20_000)
    places = np.arange(num_examples - count, num_examples)
    found = [shuffled(places, num_examples, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    if num_examples > 2:
        assert len({one.tobytes() for one in found}) == 3
    for rows in found:
        assert len(set(rows.tolist())) == count and rows.min() >= 0 and rows.max() < num_examples
        if num_examples > 2:
            share = rows / num_examples
            assert abs(share.mean() - 0.5) < 5 / np.sqrt(12 * count) * (count < num_examples) + 1 / num_examples
            follows = np.corrcoef(share[:-1], share[1:])[0, 1]
            assert abs(follows) < 5 / np.sqrt(count)
            assert abs(np.corrcoef(share, places)[0, 1]) < 5 / np.sqrt(count)
            odd = (rows % 2).mean()  # low bits too
            assert abs(odd - 0.5) < 2.5 / np.sqrt(count) + 1 / num_examples


def test_all_orders_of_few_occur() -> None:
    orders = {tuple(shuffled(np.arange(4), 4, seed, 0).tolist()) for seed in range(2000)}
    assert len(orders) == 24


def test_a_step_of_ten_million_examples_costs_what_any_step_costs() -> None:
    sampler = Sampler(10**13, 256, seed=3, shuffle=True)
    _epoch_order.cache_clear()
    tracemalloc.start()
    rows = sampler.examples_of(7 * sampler.steps_per_epoch - 2)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(set(rows)) == 256 and _epoch_order.cache_info().currsize == 0
    assert peak < 2**18


def test_data_sets_that_were_trained_on_before_keep_their_order() -> None:
    """A checkpoint of an earlier version goes on with the examples that it had not seen."""
    expected = np.random.default_rng([5, 2]).permutation(1000)[300:310].tolist()
    assert list(Sampler(1000, 10, seed=5, shuffle=True).examples_of(2 * 100 + 30)) == expected
