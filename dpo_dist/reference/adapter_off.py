"""From the policy with its adapters switched off: no second model."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dpo_dist.batch import MicroBatch, RankWork
from dpo_dist.engine import TrainingEngine
from dpo_dist.reference.source import score_bins


@dataclass(frozen=True)
class AdapterOffReference:
    """The frozen weights under the policy's adapters.

    The policy's engine runs under no_grad for it. Under ZeRO-3 its modules then run in another order than in training,
    so DeepSpeed cannot fetch weights ahead in that forward and in the next one: right, and slower than a cache.
    """

    policy: TrainingEngine

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.policy.dtype

    def token_logps(self, batch: MicroBatch) -> Float[Tensor, " M"]:
        """See `ModelReference`."""
        return self.policy.reference_token_logps(batch)

    def named_full_parameters(self) -> Iterator[tuple[str, Tensor | None]] | None:
        """None: its weights are the policy's own memory."""
        return None

    def completion_logps(self, work: RankWork) -> Float[Tensor, " C"]:
        """See `Reference`."""
        return score_bins(self.token_logps, work.reference_bins(), work.num_completions, self.policy.device)
