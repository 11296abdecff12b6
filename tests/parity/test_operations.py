"""The closed form of a forward's operations against torch's counter over the stock forward, for every architecture."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from dpo_dist.model import model_cost
from tests.parity.test_architectures import CASES, build

TOKENS = 11


@pytest.mark.parametrize("model_type", sorted(CASES))
def test_closed_form_is_what_torch_counts(model_type: str) -> None:
    case = CASES[model_type]
    config = build(model_type, **case.shape, **case.features)
    cost = model_cost(config, trust_remote_code=False)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(torch.randint(0, config.vocab_size, (1, TOKENS)), use_cache=False)
    # Eager attention computes all keys for every query, and masks what is not seen afterwards.
    keys = sum(one.per_key for one in cost.attention) * TOKENS**2
    # What is let pass: products of rotary angles, and routers that are no matrix product.
    assert counter.get_total_flops() == pytest.approx(
        (cost.per_token + cost.per_scored_token) * TOKENS + keys, rel=1e-3
    )
