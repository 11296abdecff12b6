"""Parameter groups, and the learning rate as a function of the step.

The rate is a pure function, so nothing of it has to be saved: a resumed run computes it from the step it is at.
"""

import math
from collections.abc import Iterable
from typing import Any

from torch import nn

from dpo_dist.config import TrainConfig


def parameter_groups(parameters: Iterable[tuple[str, nn.Parameter, int]], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases and norms do not, as in transformers' Trainer.

    Args:
        parameters: name, parameter, and the number of dimensions of the whole parameter (a shard has lost it).
        weight_decay: of the matrices, per unit of learning rate.
    """
    decaying, constant = [], []
    for name, parameter, dims in parameters:
        if parameter.requires_grad:
            # The biases of a layer of experts are one matrix.
            (decaying if dims >= 2 and not name.endswith("bias") else constant).append(parameter)
    groups = [{"params": decaying, "weight_decay": weight_decay}, {"params": constant, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def warmup_steps(config: TrainConfig, num_steps: int) -> int:
    """Steps over which the rate rises: a count, or below 1 a share of all steps (transformers 5)."""
    if config.warmup_steps < 1:
        return math.ceil(config.warmup_steps * num_steps)
    return int(config.warmup_steps)


def learning_rate_at(step: int, config: TrainConfig, num_steps: int) -> float:
    """The rate of update `step`, counted from 0; transformers' schedules of the same names.

    Equals:
        linear: max(0, (num_steps - step) / (num_steps - warmup)) after a warm-up of step / warmup
        cosine: (1 + cos(pi * progress)) / 2 after the same warm-up
    """
    warmup = 0 if config.lr_scheduler_type == "constant" else warmup_steps(config, num_steps)
    if step < warmup:
        return config.learning_rate * step / warmup
    if config.lr_scheduler_type in ("constant", "constant_with_warmup"):
        return config.learning_rate
    progress = (step - warmup) / max(1, num_steps - warmup)
    if config.lr_scheduler_type == "linear":
        return config.learning_rate * max(0.0, 1.0 - progress)
    return config.learning_rate * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
