"""What every source of reference log-probabilities answers."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from dpo_dist.batch import MicroBatch, RankWork


@runtime_checkable
class Reference(Protocol):
    """Where reference log-probabilities come from."""

    def completion_logps(self, work: RankWork) -> Float[Tensor, " C"]:
        """log pi_ref(completion | prompt), nats, float32, of all the rank's completions of one step.

        Every rank must call it, with its share of the same plan. In the order of `MicroBatch.completion_index_C`.
        """
        ...


@runtime_checkable
class ModelReference(Reference, Protocol):
    """A reference that is a model in memory, so that a single micro-batch can be compared with the policy."""

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        ...

    def token_logps(self, batch: MicroBatch) -> Float[Tensor, " M"]:
        """log pi_ref(token | prefix) of every scored token, nats. Every rank must call it: ZeRO-3 gathers."""
        ...

    def named_full_parameters(self) -> Iterator[tuple[str, Tensor | None]] | None:
        """As `TrainingEngine.named_full_parameters`; None where they are the policy's own memory."""
        ...


@torch.no_grad()
def score_bins(
    token_logps: Callable[[MicroBatch], Tensor], bins: Sequence[MicroBatch], num_completions: int, device: torch.device
) -> Float[Tensor, " C"]:
    """What a model gives every completion of some bins, float32. Every rank must call it with equally many bins.

    Args:
        token_logps: log pi(token | prefix) of every scored token of a bin, nats.
        bins: which hold all `num_completions` completions together.
        num_completions: of the rank's share.
        device: where the answer is wanted.
    """
    logps = torch.zeros(num_completions, dtype=torch.float32, device=device)
    for batch in bins:
        on_device = batch.to(device)
        logps[on_device.completion_index_C] = on_device.completion_sums(token_logps(on_device))
    return logps
