"""Learning rates and decay groups against transformers' own."""

import itertools

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GptOssConfig, Qwen2Config, Trainer, get_scheduler

from dpo_dist.config import TrainConfig
from dpo_dist.engine.training import _adamw
from dpo_dist.optim import learning_rate_at, parameter_groups, warmup_steps


def config(**settings: object) -> TrainConfig:
    return TrainConfig(output_dir="out", learning_rate=3e-4, **settings)


@pytest.mark.parametrize("name", ["linear", "cosine", "constant", "constant_with_warmup"])
@pytest.mark.parametrize(("warmup", "warmup_count"), [(0, 0), (1, 1), (4, 4), (0.25, 5), (0.01, 1), (20, 20), (30, 30)])
def test_equals_transformers_at_every_step(name: str, warmup: float, warmup_count: int) -> None:
    num_steps = 20
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3e-4)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup_count, num_training_steps=num_steps)
    ours = config(lr_scheduler_type=name, warmup_steps=warmup)
    for step in range(num_steps):
        assert learning_rate_at(step, ours, num_steps) == pytest.approx(
            scheduler.get_last_lr()[0], rel=1e-12, abs=1e-20
        )
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("given", "num_steps", "count"), [(0, 9, 0), (3, 9, 3), (0.5, 9, 5), (0.1, 100, 10), (0.001, 9, 1), (1, 9, 1)]
)
def test_warmup_is_a_count_or_below_one_a_share(given: float, num_steps: int, count: int) -> None:
    assert warmup_steps(config(warmup_steps=given), num_steps) == count


def test_the_first_rate_is_the_peak_without_warmup_and_zero_with() -> None:
    assert learning_rate_at(0, config(), 10) == 3e-4
    assert learning_rate_at(0, config(warmup_steps=2), 10) == 0.0


TINY = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}


@pytest.mark.parametrize(
    "architecture",
    [
        Qwen2Config(**TINY, num_attention_heads=2, num_key_value_heads=1),
        GptOssConfig(**TINY, num_attention_heads=2, num_key_value_heads=1, num_local_experts=2, pad_token_id=0),
    ],
    ids=["biases", "biases of experts"],
)
def test_decays_what_transformers_decays(architecture) -> None:
    model = AutoModelForCausalLM.from_config(architecture)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(((name, p, p.dim()) for name, p in model.named_parameters()), weight_decay=0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    decayed = {names[parameter] for parameter in groups[0]["params"]}
    # Of sinks, one number for each head, transformers says nothing: it decays them as it does any unknown vector.
    assert decayed == {name for name in Trainer.get_decay_parameter_names(None, model) if not name.endswith("sinks")}
    everything = list(itertools.chain.from_iterable(group["params"] for group in groups))
    assert sorted(map(id, everything)) == sorted(map(id, model.parameters()))


def test_frozen_parameters_and_empty_groups_are_left_out() -> None:
    linear = nn.Linear(2, 3)
    linear.bias.requires_grad_(False)
    (group,) = parameter_groups([("w", linear.weight, 2), ("b", linear.bias, 1)], 0.5)
    assert group["params"] == [linear.weight]
    assert group["weight_decay"] == 0.5


def test_the_dimensions_of_the_whole_parameter_count() -> None:
    """Under ZeRO-3 a matrix is one flat shard here; it decays all the same."""
    shard = nn.Parameter(torch.zeros(0))
    (group,) = parameter_groups([("proj.weight", shard, 2)], 0.5)
    assert group["weight_decay"] == 0.5


@pytest.mark.parametrize(("size", "begin"), [(71, 7), (67, 3), (1024, 100)])
def test_on_a_cpu_an_element_is_updated_alike_wherever_it_lies(size: int, begin: int) -> None:
    """ZeRO's stages, and its options, put elements at different places: the bits must not show it. Torch's fused do."""

    def updated(size: int, begin: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        draws = [torch.randn(64, generator=generator) for _ in range(7)]
        parameter = torch.nn.Parameter(torch.zeros(size))
        part = slice(begin, begin + 64)
        parameter.data[part] = draws[0]
        groups = [{"params": [parameter], "weight_decay": 0.01}]
        optimizer = _adamw(groups, TrainConfig(output_dir="unused"), on_gpu=False, offloaded=False)
        optimizer.param_groups[0]["lr"] = 1e-3
        for gradient in draws[1:]:
            parameter.grad = torch.zeros(size)
            parameter.grad[part] = gradient * 1e-3
            optimizer.step()
        state = optimizer.state[parameter]
        return [values.detach()[part].clone() for values in (parameter, state["exp_avg"], state["exp_avg_sq"])]

    assert all(torch.equal(*both) for both in zip(updated(size, begin), updated(1024, 0), strict=True))
