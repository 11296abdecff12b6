"""Parameters whole, wherever their parts lie."""

from collections.abc import Callable, Iterator

import deepspeed
import torch
from torch import Tensor, nn

from dpo_dist.model import external_parameters


def announce_external_parameters(model: nn.Module) -> None:
    """Tell ZeRO-3 which modules of an adapter compute with other modules' parameters; below stage 3 nothing happens."""
    for module, parameter in external_parameters(model):
        if hasattr(parameter, "ds_id"):
            deepspeed.zero.register_external_parameter(module, parameter)


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
