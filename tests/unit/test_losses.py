"""Losses against formulas written here from their papers, in Python's floats.

r_c and r_r are beta times the log-ratios of chosen and rejected, m is beta times the difference of their scores, s the
logistic function, -log s(x) = log(1 + exp(-x)). Gradients are compared with central differences of the oracle.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch

from dpo_dist.batch import build_micro_batch
from dpo_dist.config import LOSS_TYPES, LossConfig
from dpo_dist.config.loss import NO_REFERENCE, OF_RATINGS, LossType
from dpo_dist.config.loss_rules import OF_A_DIFFERENCE, READ_BY
from dpo_dist.data import Pair
from dpo_dist.logprobs import TokenScores
from dpo_dist.losses import LOSSES, PairValues, at_equality, bind, mean_loss, near_equality
from dpo_dist.losses.formulas import sigmoid
from dpo_dist.tokenization import TokenizedExample

Oracle = Callable[[float, float, float, float, LossConfig], float]

MARGINS = [-40.0, -3.0, -0.1, 0.0, 0.1, 3.0, 40.0]
# Log-ratios and lengths of pairs, away from the kinks of hinge and dpop.
PAIRS = [(0.2, 0.2, 5, 9), (1.7, -0.4, 3, 3), (-6.0, 2.5, 40, 7), (12.0, 11.0, 1, 2), (-0.3, -9.0, 100, 30)]
# The policy's log-probabilities and lengths.
LIKELIHOODS = [
    (-5.0, -5.0, 5, 9),
    (-0.2, -3.0, 3, 3),
    (-60.0, -2.5, 40, 7),
    (-0.5, -11.0, 1, 2),
    (-30.0, -9.0, 100, 30),
]
SETTINGS: dict[str, Any] = {
    "beta": 0.35,
    "label_smoothing": 0.15,
    "discopop_tau": 0.4,
    "rdpo_alpha": 0.02,
    "dpop_lambda": 3.0,
    "simpo_gamma": 0.7,
    "cpo_alpha": 0.6,
    "odpo_alpha": 0.4,
    "desirable_weight": 1.3,
    "undesirable_weight": 0.8,
}


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
        (1 - s.label_smoothing) * nll(s.beta * (c - r) + s.rdpo_alpha * (lc - lr))
        + s.label_smoothing * nll(s.beta * (r - c) + s.rdpo_alpha * (lr - lc))
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
    "dpop": lambda c, r, lc, lr, s: nll(s.beta * (c - r - s.dpop_lambda * max(0.0, -c))),
}


def log_odds(logp: float, length: int) -> float:
    p = math.exp(logp / length)
    return math.log(p / (1 - p))


# Each pair is matched with itself here; test_matching.py has the rest.
ORACLES["aot"] = ORACLES["aot_unpaired"] = ORACLES["sigmoid"]

# The same of the policy's own log-probabilities, without the likelihood term.
LIKELIHOOD_ORACLES: dict[str, Oracle] = {
    "simpo": lambda c, r, lc, lr, s: nll(s.beta * c / lc - s.beta * r / lr - s.simpo_gamma),
    "cpo": lambda c, r, lc, lr, s: nll(s.beta * c - s.beta * r),
    "orpo": lambda c, r, lc, lr, s: s.beta * nll(log_odds(c, lc) - log_odds(r, lr)),
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
    "dpop": lambda s: math.log(2),
    "aot": lambda s: math.log(2),
    "aot_unpaired": lambda s: math.log(2),
}

# f'(u) of each divergence, from the ratio u itself.
DERIVATIVES: dict[str, Callable[[float, float], float]] = {
    "reverse_kl": lambda u, a: math.log(u),
    "forward_kl": lambda u, a: 1 - 1 / u,
    "js_divergence": lambda u, a: math.log(2 * u / (u + 1)),
    "alpha_divergence": lambda u, a: (u ** (a - 1) - 1) / (a - 1),
}


def configured(name: str | list[str], **more: Any) -> LossConfig:
    """Every setting that the losses read, away from its default; those of R-DPO and ODPO only where asked for."""
    names = [name] if isinstance(name, str) else name
    read = {key for one in names for key in LOSSES[one].parameters} - {"rdpo_alpha", "odpo_alpha"}
    return LossConfig.model_validate({"loss_type": name, **{key: SETTINGS[key] for key in read}, **more})


def labels_of(like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Margins and probabilities of data that say nothing of either."""
    return torch.zeros_like(like), torch.ones_like(like)


def pairs_of(
    values: list[tuple[float, float, int, int]], requires_grad: bool = False, of_reference_0: bool = False
) -> PairValues:
    """Pairs of log-ratios and lengths; what the policy itself finds likely is not to be read.

    Or it is the log-ratio, under a reference that says 0 everywhere: `aot` takes the two apart.
    """
    columns = [torch.tensor(column, dtype=torch.float64) for column in zip(*values, strict=True)]
    unknown = torch.full_like(columns[0], math.nan)
    c, r = (column.requires_grad_(requires_grad) for column in columns[:2])
    logps = (c, r) if of_reference_0 else (unknown, unknown)
    return PairValues(c, r, *columns[2:], *logps, *labels_of(c), torch.zeros_like(c), r.detach(), c.detach())


def likelihoods_of(values: list[tuple[float, float, int, int]]) -> PairValues:
    """Pairs of log-probabilities and lengths, with gradients; log-ratios are not to be read."""
    columns = [torch.tensor(column, dtype=torch.float64) for column in zip(*values, strict=True)]
    unknown = torch.full_like(columns[0], math.nan)
    logps = (column.requires_grad_() for column in columns[:2])
    return PairValues(unknown, unknown, *columns[2:], *logps, *labels_of(unknown))


def expected(
    oracle: Callable[[float, float, float, float], float], pairs: list[tuple[float, float, int, int]]
) -> tuple[list[float], list[tuple[float, float]]]:
    """Values of pairs, and their derivatives to the first two numbers of each."""
    step, values, slopes = 1e-5, [], []
    for c, r, lc, lr in pairs:
        values.append(oracle(c, r, lc, lr))
        to_chosen = (oracle(c + step, r, lc, lr) - oracle(c - step, r, lc, lr)) / (2 * step)
        to_rejected = (oracle(c, r + step, lc, lr) - oracle(c, r - step, lc, lr)) / (2 * step)
        slopes.append((to_chosen, to_rejected))
    return values, slopes


def compare(config: LossConfig, oracle: Callable[[float, float, float, float], float]) -> None:
    of_policy = config.loss_types[0] in LIKELIHOOD_ORACLES
    pairs = likelihoods_of(LIKELIHOODS) if of_policy else pairs_of(PAIRS, True, config.loss_types[0] == "aot")
    losses = bind(config).pair_losses(pairs)
    values, slopes = expected(oracle, LIKELIHOODS if of_policy else PAIRS)
    torch.testing.assert_close(losses, torch.tensor(values, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    losses.sum().backward()
    chosen, rejected = (
        (pairs.chosen_logps, pairs.rejected_logps) if of_policy else (pairs.chosen_logratios, pairs.rejected_logratios)
    )
    gradient = torch.stack([chosen.grad, rejected.grad], 1)
    torch.testing.assert_close(gradient, torch.tensor(slopes, dtype=torch.float64), rtol=1e-6, atol=1e-8)


# ---- each loss


@pytest.mark.parametrize("name", [*ORACLES, *LIKELIHOOD_ORACLES])
def test_value_and_gradient_are_the_papers(name: str) -> None:
    config = configured(name)
    oracle = (ORACLES | LIKELIHOOD_ORACLES)[name]
    compare(config, lambda c, r, lc, lr: oracle(c, r, lc, lr, config))


@pytest.mark.parametrize("smoothing", [0.0, 0.15])
def test_rdpo_counts_the_longer_completion_as_better(smoothing: float) -> None:
    config = configured("sigmoid", rdpo_alpha=0.02, label_smoothing=smoothing)
    compare(config, lambda c, r, lc, lr: ORACLES["sigmoid"](c, r, lc, lr, config))
    longer, shorter = bind(config).pair_losses(pairs_of([(0.0, 0.0, 30, 10), (0.0, 0.0, 10, 30)])).tolist()
    assert longer < shorter


@pytest.mark.parametrize("name", ["sft", "simpo", "cpo", "orpo", ["sigmoid", "sft"]])
def test_no_closed_form_where_the_loss_depends_on_the_policy_itself(name: str | list[str]) -> None:
    assert math.isnan(at_equality(bind(configured(name))))
    assert math.isnan(at_equality(bind(configured("sigmoid", rdpo_alpha=0.1))))


@pytest.mark.parametrize("name", ORACLES)
def test_closed_form_where_the_policy_equals_the_reference(name: str) -> None:
    config = configured(name)
    loss, closed = bind(config), AT_EQUALITY[name](config)
    assert at_equality(loss) == pytest.approx(closed, rel=1e-14)
    same = pairs_of([(0.0, 0.0, 3, 8), (0.0, 0.0, 50, 1)], False, name == "aot")
    torch.testing.assert_close(loss.pair_losses(same), torch.full((2,), closed, dtype=torch.float64))


@pytest.mark.parametrize("name", ORACLES)
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
        unknown = torch.full_like(chosen, math.nan)
        logps = (chosen, rejected) if name == "aot" else (unknown, unknown)
        margins, probabilities = labels_of(chosen)
        partners = (torch.zeros_like(chosen), rejected, chosen)
        pairs = PairValues(chosen, rejected, lengths, lengths, *logps, margins, probabilities, *partners)
        moved = loss.pair_losses(pairs) - at_equality(loss)
        assert float(moved.abs().max()) <= bound * (1 + 1e-6)


@pytest.mark.parametrize("name", ORACLES)
def test_the_gradient_prefers_the_chosen_completion(name: str) -> None:
    pairs = pairs_of([(0.0, 0.0, 10, 10)], True, name == "aot")
    bind(configured(name)).pair_losses(pairs).sum().backward()
    assert pairs.chosen_logratios.grad is not None and pairs.rejected_logratios.grad is not None
    assert float(pairs.chosen_logratios.grad) < float(pairs.rejected_logratios.grad)


@pytest.mark.parametrize("beta", [0.01, 0.1, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.49])
def test_sigmoid_far_from_zero(beta: float, smoothing: float) -> None:
    chosen = torch.tensor([margin / beta + 2.0 for margin in MARGINS], dtype=torch.float64, requires_grad=True)
    rejected = torch.full_like(chosen, 2.0, requires_grad=True)
    lengths = torch.ones_like(chosen)
    losses = sigmoid(chosen, rejected, lengths, lengths, *labels_of(chosen), beta=beta, label_smoothing=smoothing)
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
    zero, one = torch.zeros_like(chosen), torch.ones_like(chosen)
    losses = sigmoid(chosen, zero, one, one, *labels_of(zero), beta=0.1, label_smoothing=smoothing)
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
        losses = bind(config).pair_losses(pairs_of(PAIRS[:2]))
        torch.testing.assert_close(losses, torch.tensor(oracle_values, dtype=torch.float64))
        return
    compare(config, oracle)


def test_alpha_one_is_reverse_kl_and_large_ratios_stay_finite() -> None:
    plain = bind(configured("sigmoid")).pair_losses
    one = bind(configured("sigmoid", f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1.0)).pair_losses
    assert torch.equal(one(pairs_of(PAIRS)), plain(pairs_of(PAIRS)))
    steep = bind(configured("hinge", f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.0))
    far = PairValues(*(torch.tensor([x], dtype=torch.float32) for x in (-500.0, 0, 1, 1, -600.0, -1.0, 0, 1)))
    assert steep.pair_losses(far).isfinite().all()


def test_losses_are_added_up_with_their_weights() -> None:
    names = ["sigmoid", "bco_pair", "ipo"]
    weighted = bind(configured(names, loss_weights=[0.8, 0.2, 3.0])).pair_losses(pairs_of(PAIRS))
    alone = [bind(configured(name)).pair_losses(pairs_of(PAIRS)) for name in names]
    torch.testing.assert_close(weighted, 0.8 * alone[0] + 0.2 * alone[1] + 3.0 * alone[2])
    torch.testing.assert_close(bind(configured(names)).pair_losses(pairs_of(PAIRS)), alone[0] + alone[1] + alone[2])


# Two examples: pairs (0, 1) of weight 2, and of completions 2, 3, 4 the pairs (3, 2) and (4, 2) of weights 1 and 0.5.
EXAMPLES = [
    TokenizedExample((1, 2, 3), ((10, 11), (20, 21, 22)), (Pair(0, 1, 2.0, margin=1.5),), "a:1"),
    TokenizedExample((5,), ((30,), (40, 41), (50, 51, 52, 53)), (Pair(1, 0), Pair(2, 0, 0.5)), "a:2"),
]
LENGTHS, CHOSEN = [2, 3, 1, 2, 4], {0: 2.0, 3: 1.0, 4: 0.5}
LOGPS, LOGRATIOS = [-3.0, -4.0, -1.0, -2.5, -6.0], [0.5, -0.25, 1.0, 1.0, -1.0]
PAIR_WEIGHT, TOKEN_WEIGHT, EXAMPLE_WEIGHT = 3.5, 2.0 * 2 + 1.0 * 2 + 0.5 * 4, 2.0
# The same completions called good or bad, the second example of weight 2.
RATED = [
    replace(EXAMPLES[0], pairs=(), ratings=(True, False)),
    replace(EXAMPLES[1], pairs=(), ratings=(False, True, False), weight=2.0),
]
RATINGS, RATING_WEIGHTS = [1, -1, -1, 1, -1], [1.0, 1.0, 2.0, 2.0, 2.0]
KL_BASELINE, REWARD_BASELINE = 0.3, -0.2


def step_loss(name: str | list[str], **more: Any) -> tuple[float, list[float]]:
    """The loss of a step of these two examples, and its derivative to the log-probability of each completion."""
    batch = build_micro_batch(RATED if name in OF_RATINGS else EXAMPLES, [0, 2], share_prompts=True)
    batch = replace(
        batch,
        partners_3B=torch.tensor([[0.3, -0.2, 0.1]] * 3, dtype=torch.float64)[:, : len(batch.pair_weight_B)],
        kl_baseline=torch.tensor(KL_BASELINE, dtype=torch.float64),
        reward_baseline=torch.tensor(REWARD_BASELINE, dtype=torch.float64),
    )
    logps = torch.tensor(LOGPS, dtype=torch.float64, requires_grad=True)
    moved = logps - torch.tensor([p - x for p, x in zip(LOGPS, LOGRATIOS, strict=True)], dtype=torch.float64)
    weights = (PAIR_WEIGHT, TOKEN_WEIGHT, EXAMPLE_WEIGHT, sum(RATING_WEIGHTS))
    loss = mean_loss(bind(configured(name, **more))(batch, logps, moved), weights)
    loss.backward()
    assert logps.grad is not None
    return float(loss.detach()), logps.grad.tolist()


RATED_ORACLES: dict[str, Callable[[float, int, LossConfig], float]] = {
    "kto": lambda x, y, s: 1 - logistic(y * s.beta * (x - KL_BASELINE)),
    "bco": lambda x, y, s: nll(y * s.beta * (x - REWARD_BASELINE)),
    "apo_zero_unpaired": lambda x, y, s: 1 - logistic(y * s.beta * x),
}


@pytest.mark.parametrize("name", OF_RATINGS)
def test_losses_of_rated_completions(name: str) -> None:
    config = configured(name)

    def expected(logratios: list[float]) -> float:
        kinds = {1: config.desirable_weight, -1: config.undesirable_weight}
        values = [
            w * kinds[y] * RATED_ORACLES[name](x, y, config)
            for x, y, w in zip(logratios, RATINGS, RATING_WEIGHTS, strict=True)
        ]
        return sum(values) / sum(RATING_WEIGHTS)

    value, gradient = step_loss(name)
    assert value == pytest.approx(expected(LOGRATIOS), rel=1e-6)
    for c in range(len(RATINGS)):
        above, below = ([x + (k == c) * step for k, x in enumerate(LOGRATIOS)] for step in (1e-5, -1e-5))
        assert gradient[c] == pytest.approx((expected(above) - expected(below)) / 2e-5, rel=1e-5)


def likelihood_term() -> float:
    return -sum(weight * LOGPS[c] for c, weight in CHOSEN.items()) / TOKEN_WEIGHT


def test_sft_is_a_mean_over_the_tokens_of_chosen_completions() -> None:
    value, gradient = step_loss("sft")
    assert value == pytest.approx(likelihood_term(), rel=1e-6)
    assert gradient == pytest.approx([-CHOSEN.get(c, 0.0) / TOKEN_WEIGHT for c in range(len(LENGTHS))], rel=1e-6)


def test_every_unit_has_its_own_denominator() -> None:
    """MPO: what belongs to pairs is divided by their weight, what belongs to tokens by theirs."""
    settings = {"loss_weights": [0.8, 0.2, 3.0]}
    both, gradient = step_loss(["sigmoid", "bco_pair", "sft"], **settings)
    pairs, of_pairs = step_loss(["sigmoid", "bco_pair"], loss_weights=[0.8, 0.2])
    tokens, of_tokens = step_loss("sft")
    assert both == pytest.approx(pairs + 3.0 * tokens, rel=1e-6)
    expected_gradient = [p + 3.0 * t for p, t in zip(of_pairs, of_tokens, strict=True)]
    assert gradient == pytest.approx(expected_gradient, rel=1e-5)


@pytest.mark.parametrize(("name", "factor"), [("cpo", SETTINGS["cpo_alpha"]), ("orpo", 1.0)])
def test_the_likelihood_term_of_a_loss_is_sft(name: str, factor: float) -> None:
    config = configured(name)
    ends = [(0, 1, 2.0), (3, 2, 1.0), (4, 2, 0.5)]
    of_pairs = [w * LIKELIHOOD_ORACLES[name](LOGPS[c], LOGPS[r], LENGTHS[c], LENGTHS[r], config) for c, r, w in ends]
    value, _ = step_loss(name)
    assert value == pytest.approx(sum(of_pairs) / PAIR_WEIGHT + factor * likelihood_term(), rel=1e-6)
    assert step_loss([name, "hinge"], loss_weights=[0.5, 1.0])[0] == pytest.approx(
        0.5 * value + step_loss("hinge")[0], rel=1e-6
    )


@pytest.mark.parametrize("ld_alpha", [None, 0.25])  # which weighs tokens in sums, not in how likely they are
def test_wpo_weighs_a_pair_by_how_likely_the_policy_is_to_write_it(ld_alpha: float | None) -> None:
    batch = build_micro_batch(EXAMPLES, [0, 2], share_prompts=True, ld_alpha=ld_alpha)
    logps = torch.tensor(LOGPS, dtype=torch.float64)
    of_tokens = [-0.1 * m for m in range(len(batch.target_ids_M))]
    squares = [-0.05 * m - 0.3 for m in range(len(of_tokens))]
    tokens = TokenScores(
        torch.tensor(of_tokens, dtype=torch.float64, requires_grad=True),
        torch.tensor([squares], dtype=torch.float64),
        ("log_sum_sq_probs",),
    )
    config = LossConfig(loss_type="hinge", use_weighting=True, beta=0.35)
    value = bind(config)(batch, logps, torch.tensor(LOGRATIOS, dtype=torch.float64), tokens)[0]
    assert not value.requires_grad
    aligned: dict[int, list[float]] = {c: [] for c in range(len(LENGTHS))}
    for m, c in enumerate(batch.completion_of_M.tolist()):
        aligned[c].append(of_tokens[m] - squares[m])
    likely = {c: math.exp(sum(x) / len(x)) for c, x in aligned.items()}
    expected_value = sum(
        w * likely[c] * likely[r] * max(0.0, 1 - 0.35 * (LOGRATIOS[c] - LOGRATIOS[r]))
        for c, r, w in [(0, 1, 2.0), (3, 2, 1.0), (4, 2, 0.5)]
    )
    assert float(value) == pytest.approx(expected_value, rel=1e-12)
    assert math.isnan(at_equality(bind(config)))


def test_ld_alpha_weighs_what_the_longer_completion_has_beyond_the_shorter_one() -> None:
    batch = build_micro_batch(EXAMPLES[:1], [0], share_prompts=True, ld_alpha=0.25)
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], dtype=torch.float64)  # two tokens, then three
    assert batch.completion_sums(values).tolist() == [3.0, 4.0 + 8.0 + 0.25 * 16.0]
    assert batch.completion_sums(values, weighted=False).tolist() == [3.0, 28.0]


def test_without_its_likelihood_term_cpo_is_dpo_without_a_reference() -> None:
    batch = build_micro_batch(EXAMPLES, [0, 2], share_prompts=True)
    logps = torch.tensor(LOGPS, dtype=torch.float64)
    free = bind(LossConfig(loss_type="sigmoid", beta=0.35))(batch, logps, logps)
    assert torch.equal(free, bind(LossConfig(loss_type="cpo", beta=0.35, cpo_alpha=0.0))(batch, logps, logps))


@pytest.mark.parametrize(("name", "key"), [(name, key) for name in LOSS_TYPES for key in LOSSES[name].parameters])
def test_every_setting_changes_the_loss(name: str, key: str) -> None:
    more = {key: SETTINGS[key]} if key in ("rdpo_alpha", "odpo_alpha") else {}
    assert step_loss(name, **more)[0] != pytest.approx(step_loss(name, **{key: SETTINGS[key] * 1.3})[0], rel=1e-6)


# ---- the table and the configuration


def test_configuration_offers_exactly_the_losses_that_exist() -> None:
    assert tuple(LOSSES) == LOSS_TYPES == get_args(LossType)
    of_pairs = {*ORACLES, *LIKELIHOOD_ORACLES}
    assert of_pairs | RATED_ORACLES.keys() | {"plackett_luce", "sft"} == set(LOSS_TYPES)  # test_labels.py has the list
    assert ORACLES.keys() == AT_EQUALITY.keys()


def test_the_rules_know_what_the_table_says() -> None:
    for key, readers in READ_BY.items():
        assert readers == tuple(name for name, spec in LOSSES.items() if key in spec.parameters)
    assert set(READ_BY) == {key for spec in LOSSES.values() for key in spec.parameters}
    assert tuple(name for name, spec in LOSSES.items() if spec.is_of_a_difference) == OF_A_DIFFERENCE
    assert tuple(name for name, spec in LOSSES.items() if not spec.reads_a_reference) == NO_REFERENCE
    assert tuple(name for name, spec in LOSSES.items() if spec.unit == "completion") == OF_RATINGS


@pytest.mark.parametrize("name", list(LOSSES))
def test_a_spec_names_its_functions_arguments(name: str) -> None:
    signature = inspect.signature(LOSSES[name].fn).parameters.values()
    settings = [key for key in LOSSES[name].parameters if key != LOSSES[name].likelihood]
    assert [p.name for p in signature if p.kind is p.KEYWORD_ONLY] == settings
    assert [p.name for p in signature if p.kind is not p.KEYWORD_ONLY] == list(LOSSES[name].needs)
