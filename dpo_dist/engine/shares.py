"""What a rank keeps of every parameter between two forwards, at every ZeRO stage: to read, overwrite and give back."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from jaxtyping import Shaped
from torch import Tensor, nn


def named_shares(model: nn.Module) -> Iterator[tuple[str, Shaped[Tensor, " n"]]]:
    """Name and own elements of each parameter, flat, tied ones once: the rank's slice under ZeRO-3, else all of them.

    They share memory with the parameter. The filling at a slice's end is no part of it.
    """
    for name, parameter in model.named_parameters():
        yield name, own_share(parameter)


def own_share(parameter: Any) -> Shaped[Tensor, " n"]:
    """The same of one parameter."""
    if not hasattr(parameter, "ds_tensor"):
        return parameter.detach().view(-1)
    shard = parameter.ds_tensor.detach()
    begin = parameter.ds_zero_partition_rank * shard.numel()
    return shard[: max(0, min(shard.numel(), parameter.ds_numel - begin))]


def begins_of(model: nn.Module) -> dict[str, int]:
    """Where each parameter's own elements begin in the whole one, flat."""
    return {
        name: p.ds_zero_partition_rank * p.ds_tensor.numel() if hasattr(p, "ds_tensor") else 0
        for name, p in cast(Iterator[tuple[str, Any]], model.named_parameters())
    }


def whole_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name and shape of each parameter, as no rank may hold it."""
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()}


def num_trained(model: nn.Module) -> int:
    """How many parameters have a gradient, whoever holds them."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)


def is_partitioned(model: nn.Module) -> bool:
    """Whether ranks hold different shares."""
    return any(hasattr(parameter, "ds_tensor") for parameter in model.parameters())


def is_on_disk(model: nn.Module) -> bool:
    """Whether a share may be on NVMe (`offload_param.device` of the DeepSpeed file)."""
    return any(getattr(parameter, "nvme_swapper", None) is not None for parameter in model.parameters())


def forget_copies(model: nn.Module) -> None:
    """Make the next forward gather every parameter from its shares, which have been written to. Sends nothing itself.

    What DeepSpeed keeps besides the shares: small parameters whole (`stage3_param_persistence_threshold`), and hpZ's
    shards of a node.
    """
    parameters: list[Any] = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_tensor")]
    for parameter in parameters:
        assert parameter.ds_status is not ZeroParamStatus.INFLIGHT, "between two forwards nothing is on its way"
        if parameter.ds_status is ZeroParamStatus.AVAILABLE:
            parameter.partition()
        parameter.ds_secondary_tensor = None


def empty(model: nn.Module) -> None:
    """Give the memory of parameters and buffers back, whoever still holds the model: DeepSpeed's hooks do."""
    for tensor in (*model.parameters(), *model.buffers()):
        for held in (getattr(tensor, "ds_tensor", None), getattr(tensor, "ds_secondary_tensor", None), tensor):
            if held is not None:
                held.data = torch.empty(0, dtype=held.dtype, device=held.device)
