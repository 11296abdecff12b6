"""What a rank holds of the float32 parameters and of AdamW's states, at every ZeRO stage: to be set anew."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from torch import Tensor

from dpo_dist.distributed import raising_together
from dpo_dist.engine.whole import masters_of
from dpo_dist.phases import reach

_STATES = ("exp_avg", "exp_avg_sq")


@runtime_checkable
class States(Protocol):
    """Where they come from."""

    def step(self) -> float:
        """Updates that AdamW's states have seen."""
        ...

    def scaler(self) -> Mapping[str, float]:
        """Float16's loss scale and what it has seen."""
        ...

    def read(self, name: str, key: str, begin: int, length: int) -> Tensor:
        """Elements of `value`, `exp_avg` or `exp_avg_sq` of a parameter, flat."""
        ...


@dataclass(frozen=True)
class _Held:
    """Consecutive elements of a parameter, in a tensor that the optimizer updates."""

    begin: int  # in the parameter, flat
    length: int
    tensor: Tensor  # the optimizer's
    offset: int  # in that


def optimizer_order(deepspeed_engine: Any) -> list[str]:
    """Names of the trained parameters as the optimizer got them, group by group; stage 0 counts them so."""
    names = {id(parameter): name for name, parameter in deepspeed_engine.module.named_parameters()}
    wrapper = deepspeed_engine.optimizer
    own = (getattr(wrapper, attribute, None) for attribute in ("bit16_groups", "bf16_groups", "fp16_groups"))
    groups = next((found for found in own if found), None) or [group["params"] for group in wrapper.param_groups]
    return [names[id(parameter)] for group in groups for parameter in group if id(parameter) in names]


def set_states(deepspeed_engine: Any, states: States) -> None:
    """Set parameters, AdamW's states and the loss scale to what was saved, whoever saved it. Collective.

    Args:
        deepspeed_engine: of the policy; nothing of its optimizer is on NVMe.
        states: each rank reads what it holds.
    """
    wrapper = deepspeed_engine.optimizer
    partitioned = hasattr(wrapper, "fp32_partitioned_groups_flat")
    if partitioned:
        wrapper.checkpoint_event_prologue()
    with raising_together():
        _set_own(deepspeed_engine, states)
    if partitioned:
        rank = torch.distributed.get_rank()
        # DeepSpeed's own way from the float32 values to those that are computed with.
        wrapper.load_state_dict({rank: wrapper.state_dict()})
        wrapper.checkpoint_event_epilogue()
    else:
        _set_replicas(deepspeed_engine, states)
    _set_scaler(wrapper, states.scaler())


def _set_own(deepspeed_engine: Any, states: States) -> None:
    inner, step = getattr(deepspeed_engine.optimizer, "optimizer", deepspeed_engine.optimizer), states.step()
    for name, held in _held(deepspeed_engine):
        reach("restore")
        _set(inner, name, held, states, step)


@torch.no_grad()
def _set(inner: Any, name: str, held: _Held, states: States, step: float) -> None:
    part = slice(held.offset, held.offset + held.length)
    held.tensor.view(-1)[part].copy_(states.read(name, "value", held.begin, held.length))
    state = inner.state[held.tensor]
    for key in _STATES:
        if key not in state:
            state[key] = torch.zeros_like(held.tensor, memory_format=torch.preserve_format)
        state[key].view(-1)[part].copy_(states.read(name, key, held.begin, held.length))
    if isinstance(inner, DeepSpeedCPUAdam):
        state["step"] = int(step)
    else:  # where torch's fused update reads it
        state["step"] = torch.tensor(step, dtype=torch.float32, device=held.tensor.device)


def _held(deepspeed_engine: Any) -> Iterator[tuple[str, _Held]]:
    """Every element once: a stage has them in one of three ways."""
    wrapper = deepspeed_engine.optimizer
    masters = masters_of(wrapper)
    for name, parameter in deepspeed_engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if hasattr(wrapper, "fp32_partitioned_groups_flat"):
            group, offset, length = wrapper.grad_position[wrapper.get_param_id(parameter)]
            begin = parameter.ds_zero_partition_rank * length
            own = max(0, min(length, parameter.ds_numel - begin))
            yield name, _Held(begin, own, wrapper.fp32_partitioned_groups_flat[group], offset)
        elif hasattr(parameter, "_hp_mapping"):
            if (mapping := parameter._hp_mapping) is not None:  # this rank has a part of it
                (flat,) = wrapper.optimizer.param_groups[mapping.param_group_index]["params"]
                own, there = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield name, _Held(own.start, own.numel, flat, there.start)
        else:
            master = masters.get(id(parameter))
            whole = parameter if master is None else master
            yield name, _Held(0, whole.numel(), whole, 0)


@torch.no_grad()
def _set_replicas(deepspeed_engine: Any, states: States) -> None:
    """Below stage 3 every rank computes with whole parameters."""
    for name, parameter in deepspeed_engine.module.named_parameters():
        if parameter.requires_grad:
            reach("restore")
            whole = states.read(name, "value", 0, parameter.numel())
            parameter.data.copy_(whole.view(parameter.shape))


def _set_scaler(wrapper: Any, saved: Mapping[str, float]) -> None:
    own = getattr(wrapper, "loss_scale_config", getattr(wrapper, "loss_scaler", None))
    if getattr(own, "last_overflow_iter", None) is None:
        return  # another dtype, whose scale is 1 always
    for key, value in saved.items():
        if hasattr(own, key):
            setattr(own, key, value)
