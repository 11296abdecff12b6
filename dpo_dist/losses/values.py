"""What losses are asked about: pairs of completions.

C completions of a micro-batch   B preference pairs
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from dpo_dist.batch import MicroBatch


@dataclass(frozen=True, eq=False)
class PairValues:
    """Log-ratios log pi_policy - log pi_reference of whole completions, in nats, and lengths in tokens."""

    chosen_logratios: Float[Tensor, " B"]
    rejected_logratios: Float[Tensor, " B"]
    chosen_lengths: Float[Tensor, " B"]
    rejected_lengths: Float[Tensor, " B"]

    @classmethod
    def of(cls, batch: MicroBatch, logratios_C: Float[Tensor, " C"]) -> "PairValues":
        """The pairs of a micro-batch."""
        chosen_B, rejected_B = batch.pair_chosen_B, batch.pair_rejected_B
        lengths_C = batch.completion_length_C.to(logratios_C.dtype)
        return cls(logratios_C[chosen_B], logratios_C[rejected_B], lengths_C[chosen_B], lengths_C[rejected_B])
