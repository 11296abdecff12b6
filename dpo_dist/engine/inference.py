"""A model that is only asked for log-probabilities."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dpo_dist.batch import MicroBatch
from dpo_dist.engine.settings import initialize
from dpo_dist.engine.whole import named_full_parameters
from dpo_dist.model import ScoringModel


class InferenceEngine:
    """A model that is only asked for log-probabilities: no optimizer, no gradient, no graph."""

    def __init__(self, model: ScoringModel, config: dict[str, Any]) -> None:
        self.model = model.requires_grad_(False).eval()
        self.engine = initialize(model=model, config=config)
        self.device = torch.device(self.engine.device)

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return next(self.model.parameters()).dtype

    @torch.no_grad()
    def token_logps(self, batch: MicroBatch) -> Float[Tensor, " M"]:
        """log pi(token | prefix) of every scored token, nats. Every rank must call it: ZeRO-3 gathers."""
        return self.engine(batch.to(self.device))

    def named_full_parameters(self) -> Iterator[tuple[str, Tensor | None]]:
        """Every parameter and persistent buffer whole, one at a time, on the first rank's CPU (None elsewhere).

        Every rank must iterate: ZeRO-3 gathers.
        """
        return named_full_parameters(self.model.model)
