"""Losses against formulas written here from their papers, in Python's floats.

r_c and r_r are beta times the log-ratios of chosen and rejected, m is beta times the difference of their scores, s the
logistic function, -log s(x) = log(1 + exp(-x)). Gradients are compared with central differences of the oracle.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch

from dpo_dist.config import LOSS_TYPES, LossConfig
from dpo_dist.config.loss import LossType
from dpo_dist.config.loss_rules import OF_A_DIFFERENCE, READ_BY
from dpo_dist.losses import LOSSES, PairLoss, PairValues, at_equality, bind, near_equality
from dpo_dist.losses.formulas import sigmoid

Oracle = Callable[[float, float, float, float, LossConfig], float]

MARGINS = [-40.0, -3.0, -0.1, 0.0, 0.1, 3.0, 40.0]
# Log-ratios and lengths of pairs, away from the kink of the hinge.
PAIRS = [(0.0, 0.0, 5, 9), (1.7, -0.4, 3, 3), (-6.0, 2.5, 40, 7), (12.0, 11.0, 1, 2), (-0.3, -9.0, 100, 30)]
SETTINGS: dict[str, Any] = {"beta": 0.35, "label_smoothing": 0.15, "discopop_tau": 0.4}


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def nll(x: float) -> float:
    """-log s(x)."""
    return math.log1p(math.exp(-x)) if x > 0 else -x + math.log1p(math.exp(x))


def oracle_exo(c: float, r: float, b: float, e: float) -> float:
    m = b * (c - r)
    return logistic(m) * (-nll(m) - math.log(1 - e)) + logistic(-m) * (-nll(-m) - math.log(e))


def oracle_discopop(m: float, tau: float) -> float:
    w = logistic(m / tau)
    return (1 - w) * nll(m) + w * math.exp(-m)


ORACLES: dict[str, Oracle] = {
    "sigmoid": lambda c, r, lc, lr, s: (
        (1 - s.label_smoothing) * nll(s.beta * (c - r)) + s.label_smoothing * nll(s.beta * (r - c))
    ),
    "hinge": lambda c, r, lc, lr, s: max(0.0, 1 - s.beta * (c - r)),
    "ipo": lambda c, r, lc, lr, s: (c / lc - r / lr - 1 / (2 * s.beta)) ** 2,
    "exo_pair": lambda c, r, lc, lr, s: oracle_exo(c, r, s.beta, s.label_smoothing),
    "nca_pair": lambda c, r, lc, lr, s: nll(s.beta * c) + (nll(-s.beta * c) + nll(-s.beta * r)) / 2,
    "robust": lambda c, r, lc, lr, s: (
        ((1 - s.label_smoothing) * nll(s.beta * (c - r)) - s.label_smoothing * nll(s.beta * (r - c)))
        / (1 - 2 * s.label_smoothing)
    ),
    "bco_pair": lambda c, r, lc, lr, s: nll(s.beta * c) + nll(-s.beta * r),
    "sppo_hard": lambda c, r, lc, lr, s: (c - 1 / (2 * s.beta)) ** 2 + (r + 1 / (2 * s.beta)) ** 2,
    "apo_zero": lambda c, r, lc, lr, s: 1 - logistic(s.beta * c) + logistic(s.beta * r),
    "apo_down": lambda c, r, lc, lr, s: logistic(s.beta * c) + 1 - logistic(s.beta * c - s.beta * r),
    "discopop": lambda c, r, lc, lr, s: oracle_discopop(s.beta * (c - r), s.discopop_tau),
    "sigmoid_norm": lambda c, r, lc, lr, s: nll(s.beta * (c / lc - r / lr)),
}

AT_EQUALITY: dict[str, Callable[[LossConfig], float]] = {
    "sigmoid": lambda s: math.log(2),
    "hinge": lambda s: 1.0,
    "ipo": lambda s: 1 / (4 * s.beta**2),
    "exo_pair": lambda s: -math.log(2) - 0.5 * math.log(s.label_smoothing * (1 - s.label_smoothing)),
    "nca_pair": lambda s: 2 * math.log(2),
    "robust": lambda s: math.log(2),
    "bco_pair": lambda s: 2 * math.log(2),
    "sppo_hard": lambda s: 1 / (2 * s.beta**2),
    "apo_zero": lambda s: 1.0,
    "apo_down": lambda s: 1.0,
    "discopop": lambda s: (math.log(2) + 1) / 2,
    "sigmoid_norm": lambda s: math.log(2),
}

# f'(u) of each divergence, from the ratio u itself.
DERIVATIVES: dict[str, Callable[[float, float], float]] = {
    "reverse_kl": lambda u, a: math.log(u),
    "forward_kl": lambda u, a: 1 - 1 / u,
    "js_divergence": lambda u, a: math.log(2 * u / (u + 1)),
    "alpha_divergence": lambda u, a: (u ** (a - 1) - 1) / (a - 1),
}


def configured(name: str | list[str], **more: Any) -> LossConfig:
    """Every setting that the losses read, away from its default."""
    names = [name] if isinstance(name, str) else name
    read = {key for one in names for key in LOSSES[one].parameters}
    return LossConfig.model_validate({"loss_type": name, **{key: SETTINGS[key] for key in read}, **more})


def pairs_of(values: list[tuple[float, float, int, int]], requires_grad: bool = False) -> PairValues:
    columns = [torch.tensor(column, dtype=torch.float64) for column in zip(*values, strict=True)]
    return PairValues(*(column.requires_grad_(requires_grad) for column in columns[:2]), *columns[2:])


def expected(oracle: Callable[[float, float, float, float], float]) -> tuple[list[float], list[tuple[float, float]]]:
    """Values of `PAIRS`, and their derivatives to both log-ratios."""
    step, values, slopes = 1e-5, [], []
    for c, r, lc, lr in PAIRS:
        values.append(oracle(c, r, lc, lr))
        to_chosen = (oracle(c + step, r, lc, lr) - oracle(c - step, r, lc, lr)) / (2 * step)
        to_rejected = (oracle(c, r + step, lc, lr) - oracle(c, r - step, lc, lr)) / (2 * step)
        slopes.append((to_chosen, to_rejected))
    return values, slopes


def compare(loss: PairLoss, oracle: Callable[[float, float, float, float], float]) -> None:
    pairs = pairs_of(PAIRS, requires_grad=True)
    losses = loss(pairs)
    values, slopes = expected(oracle)
    torch.testing.assert_close(losses, torch.tensor(values, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    losses.sum().backward()
    gradient = torch.stack([pairs.chosen_logratios.grad, pairs.rejected_logratios.grad], 1)
    torch.testing.assert_close(gradient, torch.tensor(slopes, dtype=torch.float64), rtol=1e-6, atol=1e-8)


# ---- each loss


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_value_and_gradient_are_the_papers(name: str) -> None:
    config = configured(name)
    compare(bind(config), lambda c, r, lc, lr: ORACLES[name](c, r, lc, lr, config))


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_closed_form_where_the_policy_equals_the_reference(name: str) -> None:
    config = configured(name)
    loss, closed = bind(config), AT_EQUALITY[name](config)
    assert at_equality(loss) == pytest.approx(closed, rel=1e-14)
    same = pairs_of([(0.0, 0.0, 3, 8), (0.0, 0.0, 50, 1)])
    torch.testing.assert_close(loss(same), torch.full((2,), closed, dtype=torch.float64))


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_noise_moves_the_closed_form_by_no_more_than_is_said(name: str) -> None:
    loss, noise = bind(configured(name)), 1e-3
    bound = near_equality(loss, noise)
    assert 0 < bound < 1
    generator = torch.Generator().manual_seed(0)
    for length in (1, 20):
        share, signs = torch.rand(500, dtype=torch.float64, generator=generator), torch.tensor([1.0, -1.0])
        chosen = noise * share * signs[torch.randint(2, (500,), generator=generator)]
        rejected = noise * (1 - share) * signs[torch.randint(2, (500,), generator=generator)]
        lengths = torch.full_like(chosen, length)
        moved = loss(PairValues(chosen, rejected, lengths, lengths)) - at_equality(loss)
        assert float(moved.abs().max()) <= bound * (1 + 1e-6)


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_the_gradient_prefers_the_chosen_completion(name: str) -> None:
    pairs = pairs_of([(0.0, 0.0, 10, 10)], requires_grad=True)
    bind(configured(name))(pairs).sum().backward()
    assert pairs.chosen_logratios.grad is not None and pairs.rejected_logratios.grad is not None
    assert float(pairs.chosen_logratios.grad) < float(pairs.rejected_logratios.grad)


@pytest.mark.parametrize("beta", [0.01, 0.1, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.49])
def test_sigmoid_far_from_zero(beta: float, smoothing: float) -> None:
    chosen = torch.tensor([margin / beta + 2.0 for margin in MARGINS], dtype=torch.float64, requires_grad=True)
    rejected = torch.full_like(chosen, 2.0, requires_grad=True)
    losses = sigmoid(chosen, rejected, beta=beta, label_smoothing=smoothing)
    wanted = [(1 - smoothing) * nll(m) + smoothing * nll(-m) for m in MARGINS]
    torch.testing.assert_close(losses, torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    losses.sum().backward()
    slope = [beta * (smoothing * logistic(m) - (1 - smoothing) * logistic(-m)) for m in MARGINS]
    torch.testing.assert_close(chosen.grad, torch.tensor(slope, dtype=torch.float64), rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(rejected.grad, -chosen.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_extreme_margins_stay_finite(dtype: torch.dtype, smoothing: float) -> None:
    chosen = torch.tensor([1e4, -1e4, 1e30, -1e30], dtype=dtype, requires_grad=True)
    losses = sigmoid(chosen, torch.zeros_like(chosen), beta=0.1, label_smoothing=smoothing)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert chosen.grad is not None and chosen.grad.isfinite().all()
    assert (losses >= 0).all()
    assert float(losses[1].detach()) == pytest.approx((1 - smoothing) * 1e3, rel=0.01)


# ---- divergences and sums


@pytest.mark.parametrize("name", OF_A_DIFFERENCE)
@pytest.mark.parametrize("divergence", DERIVATIVES)
def test_the_divergences_derivative_takes_the_place_of_the_log_ratio(name: str, divergence: str) -> None:
    more = {"f_alpha_divergence_coef": 0.3} if divergence == "alpha_divergence" else {}
    config = configured(name, f_divergence_type=divergence, **more)

    def oracle(c: float, r: float, lc: float, lr: float) -> float:
        c, r = (DERIVATIVES[divergence](math.exp(x), config.f_alpha_divergence_coef) for x in (c, r))
        return ORACLES[name](c, r, lc, lr, config)

    if name == "discopop" and divergence in ("forward_kl", "alpha_divergence"):
        oracle_values = [oracle(*pair) for pair in PAIRS[:2]]  # its exponential part of the others is astronomic
        torch.testing.assert_close(bind(config)(pairs_of(PAIRS[:2])), torch.tensor(oracle_values, dtype=torch.float64))
        return
    compare(bind(config), oracle)


def test_alpha_one_is_reverse_kl_and_large_ratios_stay_finite() -> None:
    plain = bind(configured("sigmoid"))
    one = bind(configured("sigmoid", f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1.0))
    assert torch.equal(one(pairs_of(PAIRS)), plain(pairs_of(PAIRS)))
    steep = bind(configured("hinge", f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.0))
    far = PairValues(*(torch.tensor([x], dtype=torch.float32) for x in (-500.0, 0.0, 1.0, 1.0)))
    assert steep(far).isfinite().all()


def test_losses_are_added_up_with_their_weights() -> None:
    names = ["sigmoid", "bco_pair", "ipo"]
    weighted = bind(configured(names, loss_weights=[0.8, 0.2, 3.0]))(pairs_of(PAIRS))
    alone = [bind(configured(name))(pairs_of(PAIRS)) for name in names]
    torch.testing.assert_close(weighted, 0.8 * alone[0] + 0.2 * alone[1] + 3.0 * alone[2])
    torch.testing.assert_close(bind(configured(names))(pairs_of(PAIRS)), alone[0] + alone[1] + alone[2])


@pytest.mark.parametrize(("name", "key"), [(name, key) for name in LOSS_TYPES for key in LOSSES[name].parameters])
def test_every_setting_changes_the_loss(name: str, key: str) -> None:
    config = configured(name)
    other = config.model_copy(update={key: SETTINGS[key] * 1.3})
    assert not torch.allclose(bind(config)(pairs_of(PAIRS)), bind(other)(pairs_of(PAIRS)))


# ---- the table and the configuration


def test_configuration_offers_exactly_the_losses_that_exist() -> None:
    assert tuple(LOSSES) == LOSS_TYPES == get_args(LossType) == tuple(ORACLES) == tuple(AT_EQUALITY)


def test_the_rules_know_what_the_table_says() -> None:
    for key, readers in READ_BY.items():
        assert readers == tuple(name for name, spec in LOSSES.items() if key in spec.parameters)
    assert set(READ_BY) == {key for spec in LOSSES.values() for key in spec.parameters}
    assert tuple(name for name, spec in LOSSES.items() if spec.is_of_a_difference) == OF_A_DIFFERENCE


@pytest.mark.parametrize("name", list(LOSSES))
def test_a_spec_names_its_functions_arguments(name: str) -> None:
    signature = inspect.signature(LOSSES[name].fn).parameters.values()
    assert [p.name for p in signature if p.kind is p.KEYWORD_ONLY] == list(LOSSES[name].parameters)
    assert [p.name for p in signature if p.kind is not p.KEYWORD_ONLY] == list(LOSSES[name].needs)
