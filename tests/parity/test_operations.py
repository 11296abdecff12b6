"""The closed form of a forward's operations against torch's counter over the stock forward, for every architecture."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from dpo_dist.cli.prepare import prepare
from dpo_dist.config import load_config
from dpo_dist.model import model_cost
from dpo_dist.packing import CostModel
from tests.launching import REPOSITORY
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


def test_training_is_counted_as_it_is_done(tmp_path: Path) -> None:
    """Frozen weights have no gradients; activations that are not kept are computed again."""

    def cost(*options: str) -> CostModel:
        return prepare(load_config(tmp_path / "run.yaml", options), tmp_path / "cache").cost

    (tmp_path / "pairs.jsonl").write_text('{"prompt_ids": [5, 6], "chosen_ids": [8, 2], "rejected_ids": [2]}\n')
    values = {
        "model": {"model_name_or_path": str(REPOSITORY / "tests" / "golden" / "tiny_policy"), "dtype": "float32"},
        "data": {"train": [{"path": str(tmp_path / "pairs.jsonl")}]},
        "train": {"output_dir": str(tmp_path / "out"), "examples_per_step": 1, "max_steps": 1},
        "parallel": {"deepspeed": "zero0_cpu"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    plain = cost("model.gradient_checkpointing=false")
    assert (plain.backward, plain.recomputed) == (2.0, 0.0)
    assert cost("model.gradient_checkpointing=true") == replace(plain, recomputed=1.0)
    assert cost("model.gradient_checkpointing=false", "adapter.peft_type=lora") == replace(plain, backward=1.0)
