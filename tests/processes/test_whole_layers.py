"""ZeRO-3 gathers the weights of a decoder layer together where the file says so: fewer gathers, the same gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils import get_z3_leaf_modules, safe_get_full_grad

from dpo_dist.config import TrainConfig, load_deepspeed
from dpo_dist.engine import TrainingEngine, engine_config
from dpo_dist.model import ScoringModel
from tests.processes.live_engines import Setting, batch_of, plain_model, save_models, train_step, whole
from tests.tiny_engine import QUIET, only_rank

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]
ONE_BY_ONE = {"leaf_module": {"classes": []}}
SPARING = {"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0}  # nothing stays from forward to backward


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole_layers")
    save_models(folder)
    return folder


def gradients(folder: Path, zero: dict[str, Any], recomputes: bool) -> tuple[TrainingEngine, dict[str, torch.Tensor]]:
    """A policy, and the gradients of a third update: DeepSpeed follows its trace by then."""
    policy = Setting(3, zero=zero).policy(folder, only_rank())
    if recomputes:
        policy.model.model.gradient_checkpointing_enable({"use_reentrant": False})
    for rate in (0.0, 0.0, None):
        for one in policy.accumulate([batch_of()]):
            policy.backward(policy.completion_logps(one).sum() / 100)
        if rate is not None:
            policy.step(rate)
    found = {name: safe_get_full_grad(parameter) for name, parameter in policy.model.named_parameters()}
    return policy, {name: gradient for name, gradient in found.items() if gradient is not None}


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("sparing", [False, True])
def test_the_gradients_are_the_same(folder: Path, sparing: bool, recomputes: bool) -> None:
    zero = SPARING if sparing else {}
    policy, together = gradients(folder, zero, recomputes)
    assert get_z3_leaf_modules(policy.model) == policy.model.switchable_layers
    policy, apart = gradients(folder, {**zero, **ONE_BY_ONE}, recomputes)
    assert get_z3_leaf_modules(policy.model) == []
    assert together.keys() == apart.keys() == dict(policy.model.named_parameters()).keys()
    for name, gradient in together.items():
        assert (gradient - apart[name]).abs().max() <= 1e-6 * apart[name].abs().max() != 0, name


def test_frozen_layers_are_gathered_weight_by_weight() -> None:
    """DeepSpeed would let go of what such a layer still needs."""
    model = plain_model({}, torch.float32)
    model.get_input_embeddings().requires_grad_(False)
    file = load_deepspeed("zero3_cpu")
    assert "LlamaDecoderLayer" in file["zero_optimization"]["leaf_module"]["classes"]
    config = engine_config(file, torch.float32, only_rank().device, 1.0)
    policy = TrainingEngine(ScoringModel(model), config, TrainConfig(output_dir="unused"), only_rank())
    assert get_z3_leaf_modules(policy.model) == []
    before = whole(policy)["model.layers.0.mlp.down_proj.weight"]
    train_step(policy, batch_of())
    assert not torch.equal(whole(policy)["model.layers.0.mlp.down_proj.weight"], before)


@pytest.mark.parametrize("looks", [0, 1, 2])
@pytest.mark.parametrize("together", [False, True])
def test_forwards_before_the_first_update_make_no_gather_more(folder: Path, together: bool, looks: int) -> None:
    """DeepSpeed would go on to let every weight go after its forward, as in a pass that has no backward."""
    policy, gathered = Setting(3, zero={} if together else ONE_BY_ONE).policy(folder, only_rank()), []
    for _ in range(looks):
        policy.token_logps(batch_of())
        with torch.no_grad():
            policy.token_logps(batch_of())
    for step in range(3):
        if step == 2:
            for parameter in policy.model.parameters():
                parameter.all_gather_coalesced = noting(parameter, gathered)
        train_step(policy, batch_of())
    assert sorted(gathered) == sorted(parameter.ds_id for parameter in policy.model.parameters())


def noting(parameter: Any, gathered: list[int]) -> Any:
    """Its gather of several parameters, which tells of each."""
    stock = parameter.all_gather_coalesced

    def all_gather_coalesced(parameters: Any, **settings: Any) -> Any:
        gathered.extend(one.ds_id for one in parameters)
        return stock(parameters, **settings)

    return all_gather_coalesced
