"""Losses against formulas written here.

With m = beta (log-ratio of chosen - log-ratio of rejected) and s the logistic function, the sigmoid loss is
-(1 - eps) log s(m) - eps log s(-m); its derivative to the chosen log-ratio is beta (eps s(m) - (1 - eps) s(-m)), which
for eps = 0 is -beta s(-m).
"""

import inspect
import math

import pytest
import torch

from dpo_dist.config import LOSS_TYPES, LossConfig
from dpo_dist.losses import LOSSES, at_equality, bind, sigmoid

MARGINS = [-40.0, -3.0, -0.1, 0.0, 0.1, 3.0, 40.0]


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


@pytest.mark.parametrize("beta", [0.01, 0.1, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.49])
def test_closed_form_and_gradient(beta: float, smoothing: float) -> None:
    chosen = torch.tensor([margin / beta + 2.0 for margin in MARGINS], dtype=torch.float64, requires_grad=True)
    rejected = torch.full_like(chosen, 2.0, requires_grad=True)
    losses = sigmoid(chosen, rejected, beta=beta, label_smoothing=smoothing)
    expected = [
        -(1 - smoothing) * math.log(logistic(m)) - smoothing * math.log(logistic(-m)) if abs(m) < 30
        # log s(m) = -log(1 + exp(-m)), which is m for a very negative m
        else (1 - smoothing) * max(-m, 0.0) + smoothing * max(m, 0.0)
        for m in MARGINS
    ]  # fmt: skip
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    losses.sum().backward()
    slope = [beta * (smoothing * logistic(m) - (1 - smoothing) * logistic(-m)) for m in MARGINS]
    torch.testing.assert_close(chosen.grad, torch.tensor(slope, dtype=torch.float64), rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(rejected.grad, -chosen.grad)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_log_two_where_the_policy_equals_the_reference(smoothing: float) -> None:
    loss = bind(LossConfig(beta=0.7, label_smoothing=smoothing))
    assert at_equality(loss) == pytest.approx(math.log(2), rel=1e-15)
    same = torch.tensor([-5.0, 0.0, 12.5])
    torch.testing.assert_close(loss(same, same), torch.full((3,), math.log(2)))


def test_label_smoothing_mixes_the_loss_of_the_flipped_pair() -> None:
    chosen, rejected = torch.randn(2, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    smooth = sigmoid(chosen, rejected, beta=0.5, label_smoothing=0.2)
    plain, flipped = sigmoid(chosen, rejected, beta=0.5), sigmoid(rejected, chosen, beta=0.5)
    torch.testing.assert_close(smooth, 0.8 * plain + 0.2 * flipped)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_extreme_margins_stay_finite(dtype: torch.dtype, smoothing: float) -> None:
    chosen = torch.tensor([1e4, -1e4, 1e30, -1e30], dtype=dtype, requires_grad=True)
    losses = sigmoid(chosen, torch.zeros_like(chosen), beta=0.1, label_smoothing=smoothing)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert chosen.grad.isfinite().all()
    assert (losses >= 0).all()
    assert float(losses[1].detach()) == pytest.approx((1 - smoothing) * 1e3, rel=0.01)


def test_the_configured_values_are_used() -> None:
    chosen, rejected = torch.tensor([1.0]), torch.tensor([-0.5])
    bound = bind(LossConfig(beta=0.3, label_smoothing=0.1))
    assert torch.equal(bound(chosen, rejected), sigmoid(chosen, rejected, beta=0.3, label_smoothing=0.1))
    assert not torch.equal(bound(chosen, rejected), bind(LossConfig(beta=0.3))(chosen, rejected))


# ---- the table and the configuration


def test_configuration_offers_exactly_the_losses_that_exist() -> None:
    assert tuple(LOSSES) == LOSS_TYPES
    choices = LossConfig.model_json_schema()["properties"]["loss_type"]
    assert choices.get("enum", [choices.get("const")]) == list(LOSSES)


def test_every_parameter_is_a_setting_and_every_setting_a_parameter() -> None:
    parameters = {name for spec in LOSSES.values() for name in spec.parameters}
    assert parameters == set(LossConfig.model_fields) - {"loss_type"}


@pytest.mark.parametrize("name", list(LOSSES))
def test_a_spec_names_its_functions_settings(name: str) -> None:
    signature = inspect.signature(LOSSES[name].fn).parameters.values()
    assert [p.name for p in signature if p.kind is p.KEYWORD_ONLY] == list(LOSSES[name].parameters)
    assert [p.name for p in signature if p.kind is not p.KEYWORD_ONLY] == ["chosen_logratios", "rejected_logratios"]
