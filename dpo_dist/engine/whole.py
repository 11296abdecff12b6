"""Parameters whole, wherever their parts lie."""

from collections.abc import Iterator

import deepspeed
import torch
from torch import Tensor, nn


def named_full_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    """Every parameter and persistent buffer whole, one at a time, on the first rank's CPU (None elsewhere).

    Every rank must iterate: ZeRO-3 gathers.
    """
    for name, parameter in model.named_parameters():
        if not hasattr(parameter, "ds_id"):
            yield name, parameter.detach().cpu() if torch.distributed.get_rank() == 0 else None
            continue
        with deepspeed.zero.GatheredParameters([parameter]):
            whole = parameter.detach().cpu().clone() if torch.distributed.get_rank() == 0 else None
        yield name, whole
    persistent = model.state_dict().keys()
    yield from ((name, buffer.cpu()) for name, buffer in model.named_buffers() if name in persistent)
