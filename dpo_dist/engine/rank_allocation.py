"""AdaLoRA: once per update the penalty on its singular vectors, and PEFT's allocation of ranks.

PEFT reads parameters and gradients where they lie, and they lie in parts; and it adds the penalty to a loss that is not
computed here. So both are done at the end of a step: the gradient of the penalty is added to the gradients of the
objective before they are clipped, and PEFT's own allocator works on whole copies, with the gradient as the update used
it. Whole are a few small matrices of each layer.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dpo_dist.engine.whole import FullParameter, masters_of
from dpo_dist.model import Adapter

_NAME = "default"


class _Copies:
    """Stands in for the model that PEFT's allocator looks through."""

    def __init__(self, copies: dict[str, nn.Parameter]) -> None:
        self.copies = copies

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.copies.items()


class RankAllocation:
    """Penalty and allocation of one run.

    Args:
        adapter: of kind `adalora`.
        model: the language model, with names as PEFT knows them.
        optimizer: DeepSpeed's.
    """

    def __init__(self, adapter: Adapter, model: nn.Module, optimizer: Any) -> None:
        self.settings = adapter.config
        # An adapter that is gone on with keeps the ranks that it was given.
        self.allocates = not adapter.has_copy
        named = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
        masters = masters_of(optimizer)
        self._parameters = {
            name: FullParameter(p, masters) for name, p in named if "lora_" in name and name.endswith(f".{_NAME}")
        }
        shapes = {name: nn.Parameter(torch.empty(full.shape)) for name, full in self._parameters.items()}
        assert adapter.allocator is not None, "an adapter of AdaLoRA has one"
        self._allocator: Any = adapter.allocator(_Copies(shapes), self.settings, _NAME)
        self._gradients: dict[str, Tensor] = {}
        self.penalty = 0.0  # of the last step, as PEFT adds it to a loss

    def before_update(self) -> None:
        """Add the penalty's gradient to the objective's, and keep the sum. Every rank must call it."""
        values = {name: full.value() for name, full in self._parameters.items()}
        of_penalty = self._penalty_gradients(values)
        for name, full in self._parameters.items():
            gradient = full.gradient()
            if (added := of_penalty.get(name)) is not None:
                gradient = gradient + added
                full.set_gradient(gradient)
            self._gradients[name] = gradient.clone()

    def after_update(self, number: int, clipping: float) -> None:
        """Take ranks away, if it is time. Every rank must call it.

        Args:
            number: of the update, counted from 1.
            clipping: what the gradients were multiplied by.
        """
        if not self.allocates:
            return
        copies = {name: nn.Parameter(full.value()) for name, full in self._parameters.items()}
        for name, copy in copies.items():
            copy.grad = self._gradients.pop(name) * clipping
        self._allocate(_Copies(copies), number)
        for name, copy in copies.items():
            if "lora_E" in name:
                self._parameters[name].set_value(copy.detach())

    def _allocate(self, copies: _Copies, number: int) -> None:
        """AdaLoraModel.update_and_allocate."""
        last = self.settings.total_step - self.settings.tfinal
        if number > last:
            self._allocator.mask_using_rank_pattern(copies, self.settings.rank_pattern)
            return
        _, pattern = self._allocator.update_and_allocate(copies, number, force_mask=number == last)
        if pattern:
            self.settings.rank_pattern = pattern
        if number == last:
            self._allocator.reset_ipt()

    @torch.enable_grad()
    def _penalty_gradients(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """d / d p of orth_reg_weight * the mean over all A and B of |A A^T - 1| and |B^T B - 1| (Frobenius)."""
        vectors = {
            name: value.clone().requires_grad_()
            for name, value in values.items()
            if "lora_A" in name or "lora_B" in name
        }
        if not vectors or self.settings.orth_reg_weight == 0:
            return {}
        terms = []
        for name, p in vectors.items():
            square = p @ p.T if "lora_A" in name else p.T @ p
            terms.append(torch.linalg.norm(square - torch.eye(len(square), device=p.device)))
        penalty = self.settings.orth_reg_weight * torch.stack(terms).mean()
        self.penalty = float(penalty.detach())
        return dict(zip(vectors, torch.autograd.grad(penalty, list(vectors.values())), strict=True))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What an exact resume needs: moving averages as tensors, the rank pattern as JSON. The same on every rank."""
        averages = {"ipt": self._allocator.exp_avg_ipt, "unc": self._allocator.exp_avg_unc}
        tensors = {f"{kind}.{name}": value for kind, named in averages.items() for name, value in named.items()}
        return tensors, {"rank_pattern": self.settings.rank_pattern}

    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self._allocator.reset_ipt()
        for key, value in tensors.items():
            kind, _, name = key.partition(".")
            held = self._allocator.exp_avg_ipt if kind == "ipt" else self._allocator.exp_avg_unc
            held[name] = value.to(self._parameters[name].device)
            self._allocator.ipt[name] = torch.zeros_like(held[name])  # only says that there are averages
        self.settings.rank_pattern = values["rank_pattern"]
