"""What losses are asked about: pairs of completions.

C completions of a micro-batch   B preference pairs
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from dpo_dist.batch import MicroBatch


@dataclass(frozen=True, eq=False)
class PairValues:
    """What the policy and the reference say of whole completions, in nats, and lengths in tokens."""

    chosen_logratios: Float[Tensor, " B"]  # log pi_policy - log pi_reference
    rejected_logratios: Float[Tensor, " B"]
    chosen_lengths: Float[Tensor, " B"]
    rejected_lengths: Float[Tensor, " B"]
    chosen_logps: Float[Tensor, " B"]  # log pi_policy
    rejected_logps: Float[Tensor, " B"]
    margins: Float[Tensor, " B"]  # by how much chosen is better, in the data's own unit
    probabilities: Float[Tensor, " B"]  # that it is better
    # What they are matched with in the whole step, without gradient: see `MicroBatch.partners_3B`.
    partner_margins: Float[Tensor, " B"] | None = None
    partner_rejected: Float[Tensor, " B"] | None = None
    partner_chosen: Float[Tensor, " B"] | None = None

    @classmethod
    def of(cls, batch: MicroBatch, logps_C: Float[Tensor, " C"], logratios_C: Float[Tensor, " C"]) -> "PairValues":
        """The pairs of a micro-batch."""
        lengths_C = batch.completion_length_C.to(logratios_C.dtype)
        ends = (batch.pair_chosen_B, batch.pair_rejected_B)
        labels = (values_B.to(logratios_C.dtype) for values_B in (batch.pair_margin_B, batch.pair_probability_B))
        partners = () if batch.partners_3B is None else batch.partners_3B.to(logratios_C.dtype).unbind()
        of_ends = (values_C[end_B] for values_C in (logratios_C, lengths_C, logps_C) for end_B in ends)
        return cls(*of_ends, *labels, *partners)
