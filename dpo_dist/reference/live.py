"""From a second, sharded engine in the same step.

It answers for the rank's whole share of a step at once, before the policy's micro-batches, in bins of its own: fewer
gathers, and its activations never stand beside the policy's.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dpo_dist.batch import MicroBatch, RankWork
from dpo_dist.engine import InferenceEngine
from dpo_dist.reference.source import score_bins


@dataclass(frozen=True)
class LiveReference:
    """A second engine in the same step, without optimizer, sharded as the policy is."""

    engine: InferenceEngine
    per_microbatch: bool = False  # in the policy's own micro-batches, not in larger bins

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.engine.dtype

    def token_logps(self, batch: MicroBatch) -> Float[Tensor, " M"]:
        """See `ModelReference`."""
        return self.engine.token_logps(batch)

    def named_full_parameters(self) -> Iterator[tuple[str, Tensor | None]] | None:
        """See `ModelReference`."""
        return self.engine.named_full_parameters()

    def completion_logps(self, work: RankWork) -> Float[Tensor, " C"]:
        """See `Reference`."""
        bins = work.micro_batches() if self.per_microbatch else work.reference_bins()
        return score_bins(self.engine.token_logps, bins, work.num_completions, self.engine.device)
