"""A model that is only asked for log-probabilities."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dpo_dist.batch import MicroBatch
from dpo_dist.engine import shares
from dpo_dist.engine.settings import initialize
from dpo_dist.engine.whole import named_full_parameters
from dpo_dist.model import ScoringModel, node_groups
from dpo_dist.phases import reach


class InferenceEngine:
    """A model that is only asked for log-probabilities: no optimizer, no gradient, no graph."""

    def __init__(self, model: ScoringModel, config: dict[str, Any]) -> None:
        self.model = model.requires_grad_(False).eval()
        with node_groups(config):
            self.engine = initialize(model=model, config=config)
        self.device = torch.device(self.engine.device)
        self.is_released = False

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return next(self.model.parameters()).dtype

    @torch.no_grad()
    def token_logps(self, batch: MicroBatch) -> Float[Tensor, " M"]:
        """log pi(token | prefix) of every scored token, nats. Every rank must call it: ZeRO-3 gathers."""
        assert not self.is_released, "its memory was given back"
        reach("reference")
        return self.engine(batch.to(self.device))

    @torch.no_grad()
    def own_token_logps(self, batch: MicroBatch) -> Float[Tensor, " M"]:
        """The same of one short completion by the architecture's own forward, without gradient (`model.own_logps`).

        Every rank must call it: ZeRO-3 gathers.
        """
        return self.engine(batch.to(self.device), by_itself=True)

    def named_shares(self) -> Iterator[tuple[str, Tensor]]:
        """What this rank keeps of every parameter, flat, to read or to overwrite; then call `shares_have_changed`."""
        return shares.named_shares(self.model.model)

    def begins_of_shares(self) -> dict[str, int]:
        """Where each of them begins in the whole parameter, flat."""
        return shares.begins_of(self.model.model)

    @property
    def is_partitioned(self) -> bool:
        """Whether ranks hold different shares: ZeRO stage 3."""
        return shares.is_partitioned(self.model)

    @property
    def is_on_disk(self) -> bool:
        """Whether shares are kept on NVMe, out of reach."""
        return shares.is_on_disk(self.model)

    def whole_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter."""
        return shares.whole_shapes(self.model.model)

    def shares_have_changed(self) -> None:
        """Make the next forward use what was written to the shares. Every rank must call it."""
        shares.forget_copies(self.model)

    def release(self) -> None:
        """Give the memory of parameters and buffers back for good; the engine cannot be asked any more.

        On a GPU torch then returns it to the device; this has not been run on one.
        """
        self.engine.destroy()
        shares.empty(self.model)
        self.is_released = True
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def named_full_parameters(self) -> Iterator[tuple[str, Tensor | None]]:
        """Every parameter and persistent buffer whole, one at a time, on the first rank's CPU (None elsewhere).

        Every rank must iterate: ZeRO-3 gathers.
        """
        return named_full_parameters(self.model.model)
