"""Parameters whole, wherever their parts lie."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    link_hp_params,
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_local_fp32_param,
    safe_set_local_grad,
)
from torch import Tensor, nn

from dpo_dist.phases import reach


def named_full_parameters(
    model: nn.Module, wanted: Callable[[nn.Parameter], bool] | None = None
) -> Iterator[tuple[str, Tensor | None]]:
    """Every parameter and persistent buffer whole, one at a time, on the first rank's CPU (None elsewhere).

    Every rank must iterate: ZeRO-3 gathers.

    Args:
        model: any module.
        wanted: which parameters are gathered at all; None: every one, and the buffers.
    """
    for name, parameter in model.named_parameters():
        reach("gather")
        if wanted is not None and not wanted(parameter):
            continue
        if not hasattr(parameter, "ds_id"):
            yield name, parameter.detach().cpu() if torch.distributed.get_rank() == 0 else None
            continue
        with deepspeed.zero.GatheredParameters([parameter]):
            whole = parameter.detach().cpu().clone() if torch.distributed.get_rank() == 0 else None
        yield name, whole
    if wanted is not None:
        return
    persistent = model.state_dict().keys()
    yield from ((name, buffer.cpu()) for name, buffer in model.named_buffers() if name in persistent)


def masters_of(optimizer: Any) -> dict[int, Tensor]:
    """The float32 values of half-precision parameters by their ids, where DeepSpeed keeps them whole (stage 0)."""
    halved, masters = getattr(optimizer, "fp16_groups", ()), getattr(optimizer, "fp32_groups", ())
    if not all(isinstance(group, list) for group in (*halved, *masters)) or not masters:
        return {}
    pairs = [pair for groups in zip(halved, masters, strict=True) for pair in zip(*groups, strict=True)]
    return {id(parameter): master for parameter, master in pairs if parameter.shape == master.shape}


def find_masters(optimizer: Any) -> None:
    """Make DeepSpeed find the float32 values of a parameter where `round_robin_gradients` has put them.

    0.19.8 looks where they would be without it, and reads and sets those of other parameters.
    """
    if getattr(optimizer, "round_robin_gradients", False):
        optimizer._link_all_hp_params = functools.partial(_link, optimizer)
        optimizer._link_all_hp_params()
        optimizer._param_slice_mappings = optimizer._create_param_mapping()


def _link(optimizer: Any) -> None:
    """DeepSpeed's own, with the offsets that it leaves out."""
    if optimizer.cpu_offload:
        optimizer._get_offload_gradient_dict()
    for group, parameters in enumerate(optimizer.bit16_groups):
        in_row = zip(optimizer.round_robin_bit16_groups[group], optimizer.round_robin_bit16_offsets[group], strict=True)
        offsets = {id(parameter): offset for parameter, offset in in_row}
        own, ranks = optimizer.single_partition_of_fp32_groups[group], optimizer.real_dp_process_group[group]
        link_hp_params(
            lp_param_list=parameters,
            flat_hp_partition=own,
            gradient_dict=optimizer.averaged_gradients,
            offload_gradient_dict=optimizer.offload_gradient_dict,
            use_offload=optimizer.cpu_offload,
            param_group_index=group,
            partition_start=torch.distributed.get_rank(ranks) * own.numel(),
            partition_size=own.numel(),
            dp_group=ranks,
            param_offsets=[offsets[id(parameter)] for parameter in parameters],
        )


class FullParameter:
    """One trained parameter: value and gradient whole and in float32, wherever their parts lie. Collective.

    Between the last backward of a step and its update; DeepSpeed's own functions for this do not know the padding of
    sizes that the ranks do not divide.
    """

    def __init__(self, parameter: Any, masters: dict[int, Tensor] | None = None) -> None:
        self.parameter = parameter
        self.master = (masters or {}).get(id(parameter))
        self.shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
        self.device: torch.device = parameter.device

    def value(self) -> Tensor:
        """The optimizer's own value, where it has one."""
        whole = safe_get_full_fp32_param(self.parameter) if self.master is None else self.master.detach()
        return (self.parameter.detach() if whole is None else whole).float().reshape(self.shape).clone()

    def gradient(self) -> Tensor:
        """The sum of all ranks' gradients of this step."""
        whole = safe_get_full_grad(self.parameter)
        assert whole is not None, "there is no gradient before the last backward of a step, or after the update"
        return whole.detach().float().reshape(self.shape)

    def set_gradient(self, whole: Tensor) -> None:
        """Replace the gradient before the update."""
        if hasattr(self.parameter, "ds_id"):
            safe_set_local_grad(self.parameter, self._own_part(whole))
        elif (accumulated := getattr(self.parameter, "_hp_grad", None)) is not None:
            # Where float32 sums are kept beside bfloat16 gradients DeepSpeed reads these sums, and sets the others.
            accumulated.copy_(whole.reshape(accumulated.shape))
        else:
            safe_set_full_grad(self.parameter, whole)

    @torch.no_grad()
    def set_value(self, whole: Tensor) -> None:
        """Replace the value that is computed with, and the optimizer's own."""
        parameter = self.parameter
        if not hasattr(parameter, "ds_id"):
            safe_set_full_fp32_param(parameter, whole)
            if self.master is not None:
                self.master.copy_(whole)
            parameter.copy_(whole)
            return
        own = self._own_part(whole)
        safe_set_local_fp32_param(parameter, own)
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(whole)

    def _own_part(self, whole: Tensor) -> Tensor:
        size, rank = self.parameter.ds_tensor.numel(), torch.distributed.get_rank()
        padded = whole.new_zeros(max(whole.numel(), size * (rank + 1)))
        padded[: whole.numel()] = whole.flatten()
        return padded[size * rank : size * (rank + 1)]
