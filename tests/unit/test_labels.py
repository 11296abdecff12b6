"""What data say beyond "chosen is better": how sure, by how much, in which order of many. Against naive formulas."""

import itertools
import math
import random
from typing import Any

import pytest
import torch

from dpo_dist.batch import MicroBatch, build_micro_batch
from dpo_dist.config import LossConfig
from dpo_dist.data import Pair
from dpo_dist.losses import UNITS, at_equality, bind, mean_loss
from dpo_dist.tokenization import TokenizedExample

BETA = 0.35


def nll(x: float) -> float:
    """-log s(x), s the logistic function."""
    return math.log1p(math.exp(-x)) if x > 0 else -x + math.log1p(math.exp(x))


def batch_of(*examples: tuple[int, list[Pair], float]) -> MicroBatch:
    """Examples of so many completions of 1, 2, 3, ... tokens."""
    made = [
        TokenizedExample((1, 2), tuple(tuple(range(5, 6 + k)) for k in range(count)), tuple(pairs), "a:1", weight)
        for count, pairs, weight in examples
    ]
    starts = itertools.accumulate((count for count, _, _ in examples), initial=0)
    return build_micro_batch(made, list(starts)[:-1], share_prompts=True)


def value_and_gradient(
    batch: MicroBatch, logratios: list[float], weights: tuple[float, float, float], **loss: Any
) -> tuple[float, list[float]]:
    """Of a step of one micro-batch; the policy's own log-probabilities are not to be read."""
    ratios = torch.tensor(logratios, dtype=torch.float64, requires_grad=True)
    unknown = torch.full_like(ratios, math.nan)
    value = mean_loss(bind(LossConfig.model_validate({"beta": BETA, **loss}))(batch, unknown, ratios), (*weights, 1.0))
    (gradient,) = torch.autograd.grad(value, ratios)
    return float(value.detach()), gradient.tolist()


# ---- pairs


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_soft_labels_and_margins(smoothing: float) -> None:
    """-p log s(m) - (1 - p) log s(-m), m less odpo_alpha * margin."""
    pairs = [Pair(0, 1, 1.0, 0.0, 0.8), Pair(1, 0, 2.0, 3.0, 1.0), Pair(0, 1, 0.5, -1.0, 0.25)]
    ratios, alpha, step = [1.5, -0.7], 0.4, 1e-5

    def oracle(chosen: float, rejected: float) -> float:
        ends, total = (chosen, rejected), 0.0
        for pair in pairs:
            m = BETA * (ends[pair.chosen] - ends[pair.rejected]) - alpha * pair.margin
            p = (1 - smoothing) * pair.probability + smoothing * (1 - pair.probability)
            total += pair.weight * (p * nll(m) + (1 - p) * nll(-m))
        return total / 3.5

    loss = {"label_smoothing": smoothing, "odpo_alpha": alpha}
    value, gradient = value_and_gradient(batch_of((2, pairs, 1.0)), ratios, (3.5, 1.0, 1.0), **loss)
    assert value == pytest.approx(oracle(*ratios), rel=1e-6)  # the data's numbers are float32
    slopes = [
        (oracle(ratios[0] + step, ratios[1]) - oracle(ratios[0] - step, ratios[1])) / (2 * step),
        (oracle(ratios[0], ratios[1] + step) - oracle(ratios[0], ratios[1] - step)) / (2 * step),
    ]
    assert gradient == pytest.approx(slopes, rel=1e-5)


def test_an_even_label_has_its_minimum_where_both_are_alike() -> None:
    batch = batch_of((2, [Pair(0, 1, probability=0.5)], 1.0))
    value, gradient = value_and_gradient(batch, [0.3, 0.3], (1.0, 1.0, 1.0))
    assert value == pytest.approx(math.log(2))
    assert gradient == pytest.approx([0.0, 0.0], abs=1e-12)


def test_a_margin_moves_the_closed_form() -> None:
    assert math.isnan(at_equality(bind(LossConfig(odpo_alpha=0.1))))
    value, _ = value_and_gradient(
        batch_of((2, [Pair(0, 1, margin=2.0)], 1.0)), [0.0, 0.0], (1.0, 1.0, 1.0), odpo_alpha=0.5
    )
    assert value == pytest.approx(nll(-1.0))


# ---- lists


def ranking(order: list[int]) -> list[Pair]:
    """Every two of a strict order, best first."""
    return [Pair(a, b) for a, b in itertools.combinations(order, 2)]


def plackett_luce(order: list[int], rewards: list[float]) -> float:
    """-log of the product over places of exp(r) by the sum of exp(r) over this and all later places: the paper's."""
    product = 1.0
    for place, best in enumerate(order):
        product *= math.exp(rewards[best]) / sum(math.exp(rewards[j]) for j in order[place:])
    return -math.log(product)


@pytest.mark.parametrize("seed", range(8))
def test_plackett_luce_is_the_papers(seed: int) -> None:
    """Value and gradient of two rankings of different length and weight, whatever the order of their pairs."""
    draw, step = random.Random(seed), 1e-5
    counts, weights = (draw.randint(2, 6), draw.randint(2, 6)), (1.0, 2.5)
    orders = [draw.sample(range(count), count) for count in counts]
    pairs = [draw.sample(ranking(order), len(ranking(order))) for order in orders]
    ratios = [draw.gauss(0, 4) for _ in range(sum(counts))]
    batch = batch_of(*zip(counts, pairs, weights, strict=True))

    def oracle(values: list[float]) -> float:
        rewards = [BETA * value for value in values]
        parts = rewards[: counts[0]], rewards[counts[0] :]
        return sum(w * plackett_luce(o, r) for w, o, r in zip(weights, orders, parts, strict=True)) / 3.5

    value, gradient = value_and_gradient(batch, ratios, (99.0, 99.0, 3.5), loss_type="plackett_luce")
    assert value == pytest.approx(oracle(ratios), rel=1e-9)
    slopes = []
    for c in range(len(ratios)):
        up, down = ([x + sign * step * (k == c) for k, x in enumerate(ratios)] for sign in (1, -1))
        slopes.append((oracle(up) - oracle(down)) / (2 * step))
    assert gradient == pytest.approx(slopes, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_plackett_luce_at_equality_is_the_logarithm_of_the_number_of_orders(count: int) -> None:
    batch = batch_of((count, ranking(list(range(count))), 1.0))
    value, _ = value_and_gradient(batch, [0.0] * count, (1.0, 1.0, 1.0), loss_type="plackett_luce")
    assert value == pytest.approx(math.log(math.factorial(count)))
    assert math.isnan(at_equality(bind(LossConfig(loss_type="plackett_luce"))))  # rankings may differ in length


def test_plackett_luce_of_two_is_dpo() -> None:
    batch, ratios = batch_of((2, [Pair(1, 0)], 1.0)), [3.0, -2.0]
    pair, of_pair = value_and_gradient(batch, ratios, (1.0, 1.0, 1.0))
    whole, of_list = value_and_gradient(batch, ratios, (1.0, 1.0, 1.0), loss_type="plackett_luce")
    assert whole == pytest.approx(pair)
    assert of_list == pytest.approx(of_pair)


def test_plackett_luce_stays_finite_and_idle_ranks_add_nothing() -> None:
    batch = batch_of((3, ranking([0, 1, 2]), 1.0))
    value, gradient = value_and_gradient(batch, [-1e4, 1e4, 0.0], (1.0, 1.0, 1.0), loss_type="plackett_luce")
    assert value == pytest.approx(BETA * 2e4)
    assert all(map(math.isfinite, gradient))
    filler = build_micro_batch([], [], share_prompts=True)
    nothing = torch.zeros(0, dtype=torch.float64)
    assert bind(LossConfig(loss_type="plackett_luce"))(filler, nothing, nothing).tolist() == [0.0] * len(UNITS)
