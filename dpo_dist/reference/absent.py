"""None: the objective compares completions under the policy alone."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dpo_dist.batch import RankWork


@dataclass(frozen=True)
class NoReference:
    """A reference that finds every completion equally likely; only differences of log-ratios count, so it says 0."""

    device: torch.device

    def completion_logps(self, work: RankWork) -> Float[Tensor, " C"]:
        """See `Reference`."""
        return torch.zeros(work.num_completions, dtype=torch.float32, device=self.device)
