"""Learning rates and decay groups against transformers' own."""

import itertools
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GptOssConfig, Qwen2Config, Trainer, get_scheduler

from dpo_dist.config import TrainConfig
from dpo_dist.engine.adamw import CPUAdamW
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


def test_on_a_gpu_it_is_torchs_fused_update() -> None:
    """Which torch makes on a CPU as well: what it computes is held to ours below."""
    given = TrainConfig(output_dir="unused", adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6)
    group = {"params": [nn.Parameter(torch.zeros(3))], "weight_decay": 0.1}
    optimizer = _adamw([group], given, on_gpu=True, offloaded=False)
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["fused"] is True
    (kept,) = optimizer.param_groups
    assert kept["fused"] is True and kept["amsgrad"] is kept["maximize"] is False
    assert (kept["lr"], kept["betas"], kept["eps"], kept["weight_decay"]) == (0.0, (0.8, 0.95), 1e-6, 0.1)


def test_offloaded_from_a_gpu_it_is_deepspeeds_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its operator is loaded first, behind the lock that keeps ranks from compiling it side by side."""
    asked: list[Any] = []
    groups = [{"params": [nn.Parameter(torch.zeros(3))], "weight_decay": 0.1}]
    stands_for_it = torch.optim.SGD(groups)

    def deepspeeds(groups: Any, **settings: Any) -> torch.optim.Optimizer:
        asked.append((groups, settings))
        return stands_for_it

    monkeypatch.setattr(f"{_adamw.__module__}.load_operator", asked.append)
    monkeypatch.setattr(f"{_adamw.__module__}.DeepSpeedCPUAdam", deepspeeds)
    assert _adamw(groups, TrainConfig(output_dir="unused"), on_gpu=True, offloaded=True) is stands_for_it
    settings = {"lr": 0.0, "betas": (0.9, 0.999), "eps": 1e-8, "adamw_mode": True}
    assert asked == ["CPUAdamBuilder", (groups, settings)]


def test_a_run_on_a_cpu_has_nothing_to_offload() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    made = _adamw([{"params": [parameter]}], TrainConfig(output_dir="unused"), on_gpu=False, offloaded=True)
    assert type(made) is CPUAdamW


def adamw(groups: list[dict]) -> torch.optim.Optimizer:
    """That of a run on a CPU."""
    return _adamw(groups, TrainConfig(output_dir="unused", adam_beta2=0.95), on_gpu=False, offloaded=False)


@pytest.mark.parametrize("threads", [1, 3])
def test_on_a_cpu_it_is_torchs_own_fused_update_where_all_vectors_are_whole(threads: int) -> None:
    drawn = [torch.randn(16 * 5001), torch.randn(4, 16)]
    ours, theirs = ([nn.Parameter(values.clone()) for values in drawn] for _ in range(2))
    own = adamw([{"params": ours, "weight_decay": 0.1}])
    stock = torch.optim.AdamW(theirs, lr=0.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for step in range(4):
            for mine, other in zip(ours, theirs, strict=True):
                mine.grad = torch.randn_like(mine)
                other.grad = mine.grad.clone()
            own.param_groups[0]["lr"] = stock.param_groups[0]["lr"] = 1e-2 * step
            own.step()
            stock.step()
    finally:
        torch.set_num_threads(before)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)
        assert all(torch.equal(own.state[mine][name], stock.state[other][name]) for name in stock.state[other])


@pytest.mark.parametrize("shape", [(), (1,), (5, 3), (16,), (33,)])
def test_on_a_cpu_it_is_adamw(shape: tuple[int, ...]) -> None:
    """The formula in float64, a parameter without gradient beside it, and one of another group."""
    rate, decay = 1e-2, 0.1
    parameter, idle, other = (nn.Parameter(torch.randn(shape)) for _ in range(3))
    optimizer = adamw([{"params": [parameter, idle], "weight_decay": decay}, {"params": [other], "weight_decay": 0.0}])
    for group in optimizer.param_groups:
        group["lr"] = rate
    wanted, before = [value.detach().double() for value in (parameter, other)], idle.detach().clone()
    means, squares = ([torch.zeros_like(value) for value in wanted] for _ in range(2))
    for step in range(1, 5):
        for number, (value, weight_decay) in enumerate([(parameter, decay), (other, 0.0)]):
            value.grad = torch.randn(shape)
            gradient = value.grad.double()
            means[number] = 0.9 * means[number] + 0.1 * gradient
            squares[number] = 0.95 * squares[number] + 0.05 * gradient**2
            mean, square = means[number] / (1 - 0.9**step), squares[number] / (1 - 0.95**step)
            wanted[number] = (1 - rate * weight_decay) * wanted[number] - rate * mean / (square.sqrt() + 1e-8)
        optimizer.step()
        assert optimizer.state[parameter]["step"] == step
    torch.testing.assert_close([parameter.double(), other.double()], wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(idle, before)
    assert idle not in optimizer.state


@pytest.mark.parametrize(("size", "begin"), [(64, 0), (71, 7), (67, 3), (79, 15), (1024, 100)])
def test_on_a_cpu_an_element_is_updated_alike_wherever_it_lies(size: int, begin: int) -> None:
    """ZeRO's stages, and its options, put elements at different places: the bits must not show it. Torch's own do."""

    def updated(size: int, begin: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        draws = [torch.randn(64, generator=generator) for _ in range(7)]
        parameter = torch.nn.Parameter(torch.zeros(size))
        part = slice(begin, begin + 64)
        parameter.data[part] = draws[0]
        optimizer = adamw([{"params": [parameter], "weight_decay": 0.01}])
        optimizer.param_groups[0]["lr"] = 1e-3
        for gradient in draws[1:]:
            parameter.grad = torch.zeros(size)
            parameter.grad[part] = gradient * 1e-3
            optimizer.step()
        state = optimizer.state[parameter]
        return [values.detach()[part].clone() for values in (parameter, state["exp_avg"], state["exp_avg_sq"])]

    assert all(torch.equal(*both) for both in zip(updated(size, begin), updated(1024, 0), strict=True))
