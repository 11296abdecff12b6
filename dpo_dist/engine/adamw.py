"""AdamW in one pass on a CPU, with the same bits wherever an element lies.

torch's fused kernel computes in vectors of 64 bytes, and what is left at the end of a tensor one by one, which rounds
otherwise. What is left depends on how a ZeRO stage cuts and joins parameters, and a run may change its stage or its
number of ranks. So what is left is computed in a vector of its own here, filled up.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from torch import Tensor
from torch.optim.adamw import adamw

_VECTOR_BYTES = 64  # torch's kernel cuts its work between threads at multiples of it as well


class CPUAdamW(torch.optim.AdamW):
    """torch.optim.AdamW; states have the same names and forms, `amsgrad` and `maximize` are not there.

    Equals, with t updates before this one:
        m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
        p = (1 - lr decay) p - lr (m / (1 - beta1^(t+1))) / (sqrt(v / (1 - beta2^(t+1))) + eps)
    (arXiv:1711.05101, algorithm 2, with the schedule multiplier in lr)
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None, "the gradient is there before the update"
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            parts = _Parts()
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parts.add(parameter, parameter.grad, self._state_of(parameter))
            parameters, gradients, means, squares = parts.columns
            adamw(
                parameters, gradients, means, squares, [], parts.steps, fused=True, amsgrad=False, maximize=False,
                beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
            )  # fmt: skip
            parts.write_back()

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state


ZERO_SUPPORTED_OPTIMIZERS.append(CPUAdamW)  # of other classes DeepSpeed warns in every run


class _Parts:
    """What one call of the kernel updates: of each tensor the whole vectors, and a copy of what is left, filled up."""

    def __init__(self) -> None:
        self.columns: tuple[list[Tensor], ...] = ([], [], [], [])  # parameters, gradients, and the two states
        self.steps: list[Tensor] = []
        self._copied: list[tuple[Tensor, Tensor]] = []

    def add(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any]) -> None:
        """A parameter with what belongs to it; contiguous, as DeepSpeed asks of all."""
        whole = (parameter.view(-1), gradient.reshape(-1), state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1))
        width = _VECTOR_BYTES // parameter.element_size()
        left = parameter.numel() % width
        body = parameter.numel() - left
        if body:
            self._append([values[:body] for values in whole], state["step"])
        if left:
            copies = [F.pad(values[body:], (0, width - left)) for values in whole]
            self._copied += [(values[body:], copy[:left]) for values, copy in zip(whole, copies, strict=True)]
            # The kernel counts up what it is given: each tensor's own counter once.
            self._append(copies, state["step"].clone() if body else state["step"])

    def _append(self, values: list[Tensor], step: Tensor) -> None:
        for column, value in zip(self.columns, values, strict=True):
            column.append(value)
        self.steps.append(step)

    def write_back(self) -> None:
        """Give what was left its new values."""
        for place, values in self._copied:
            place.copy_(values)
