"""log pi_ref: from a live sharded engine.

The reference answers for the rank's whole share of a step at once, before the policy's micro-batches, in bins of its
own: fewer gathers, and its activations never stand beside the policy's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from dpo_dist.batch import MicroBatch
from dpo_dist.engine import InferenceEngine


@runtime_checkable
class Reference(Protocol):
    """Where reference log-probabilities come from."""

    def completion_logps(self, bins: Sequence[MicroBatch], num_completions: int) -> Float[Tensor, " C"]:
        """log pi_ref(completion | prompt), nats, of the rank's `num_completions` completions of one step."""
        ...


@dataclass(frozen=True)
class LiveReference:
    """A second engine in the same step, without optimizer, sharded as the policy is."""

    engine: InferenceEngine

    def completion_logps(self, bins: Sequence[MicroBatch], num_completions: int) -> Float[Tensor, " C"]:
        """See `Reference`. Every rank must call it with equally many bins."""
        device = self.engine.device
        logps = torch.zeros(num_completions, dtype=torch.float32, device=device)
        for batch in bins:
            on_device = batch.to(device)
            logps[on_device.completion_index_C] = on_device.completion_sums(self.engine.token_logps(on_device))
        return logps
