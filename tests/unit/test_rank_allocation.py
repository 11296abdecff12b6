"""Whole values and gradients of parameters that lie in parts, in bfloat16 with float32 masters, at every ZeRO stage."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_dist.adapters import attach_adapter
from dpo_dist.attention.interface import register
from dpo_dist.batch import build_micro_batch
from dpo_dist.config import AdapterConfig, TrainConfig, load_deepspeed
from dpo_dist.engine import TrainingEngine, engine_config
from dpo_dist.engine.whole import FullParameter, masters_of
from dpo_dist.errors import ConfigError
from dpo_dist.model import load_model
from dpo_dist.pretrained import load_config
from tests.parity.adapter_cases import CASES, examples_of_step, save_base
from tests.tiny_engine import QUIET, only_rank

pytestmark = [pytest.mark.filterwarnings(rule) for rule in QUIET]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "base", tied=False)


def make(base: Path, settings: dict[str, Any], dtype: torch.dtype) -> TrainingEngine:
    config = load_config(base, trust_remote_code=False)
    model = load_model(base, config, register("sdpa"), dtype, settings, False, False)
    attach_adapter(model, AdapterConfig(**CASES["adalora"].adapter), str(base), 7, 5, settings)
    return TrainingEngine(model, settings, TrainConfig(output_dir="unused"), only_rank())


@pytest.mark.parametrize("file", [f"zero{stage}{kind}" for stage in range(4) for kind in ("_cpu", "_bf16")])
def test_masters_and_gradients_are_set(base, file):
    settings = engine_config(load_deepspeed(file), torch.bfloat16, only_rank().device, 1e9)
    settings["zero_optimization"].pop("offload_optimizer", None)
    if file.startswith("zero3"):
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    engine = make(base, settings, torch.bfloat16)
    batch = build_micro_batch(examples_of_step(0), [0, 2, 5, 7], True)
    for one in engine.accumulate([batch]):
        engine.backward(-engine.token_logps(one).mean())
    named = {name: p for name, p in engine.model.named_parameters() if p.requires_grad and "lora_E" in name}
    full = FullParameter(next(iter(named.values())), masters_of(engine.engine.optimizer))
    gradient, value = torch.linspace(-1, 1, 5)[:, None] / 3, torch.linspace(0.5, 1, 5)[:, None] / 7
    assert float(full.gradient().abs().max()) > 0
    full.set_gradient(gradient)
    assert torch.allclose(full.gradient(), gradient, rtol=2**-8)
    full.set_value(value)
    assert torch.equal(full.value(), value), "the float32 master"
    computed = dict(engine.named_adapter_parameters())[next(iter(named)).removeprefix("model.")]
    assert computed is not None and torch.equal(computed.float(), value.bfloat16().float())
    engine.allocation = None
    norm = float(engine.step(1e-3))
    assert norm > float(gradient.norm()) * 0.99, "the norm is of what was set"
    # AdamW's first update is the rate in the direction of the gradient; decay is off.
    moved = full.value() - value
    assert torch.allclose(moved, -1e-3 * gradient.sign(), atol=1e-6), "an update of the master by what was set"
    engine.engine.destroy()


def test_scaled_gradients_are_refused(base):
    settings = engine_config({"zero_optimization": {"stage": 0}}, torch.float32, only_rank().device, 1.0)
    with pytest.raises(ConfigError, match=r"adapter\.peft_type=adalora does not go with model\.dtype=float16"):
        make(base, settings | {"fp16": {"enabled": False}}, torch.float32)
