"""Two evaluations of the same completions (C of them), compared over all ranks."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dpo_dist.batch import MicroBatch
from dpo_dist.distributed import all_gather_json
from dpo_dist.noise import honest


@dataclass(frozen=True)
class Comparison:
    """Two evaluations of the same completions, on one rank."""

    difference_C: Float[Tensor, " C"]  # nats, float64, on CPU
    honest_C: Float[Tensor, " C"]  # nats: what rounding explains (rms)
    lengths_C: Float[Tensor, " C"]  # tokens

    def excess(self) -> list[float]:
        """Differences of all ranks in units of honest noise. Collective."""
        return gather(self.difference_C / self.honest_C)

    def per_root_token(self) -> list[float]:
        """Differences of all ranks in nats per sqrt(token). Collective."""
        return gather(self.difference_C / self.lengths_C.sqrt())


def compare(
    other: MicroBatch, other_logps_C: Tensor, batch: MicroBatch, logps_C: Float[Tensor, " C"], scale: float
) -> Comparison:
    """Completions of `other` against the same ones of `batch`, as far as they are in both."""
    place = {int(index): i for i, index in enumerate(batch.completion_index_C)}
    here = [(i, place[int(index)]) for i, index in enumerate(other.completion_index_C) if int(index) in place]
    in_other, in_batch = torch.tensor(here, dtype=torch.int64).view(-1, 2).unbind(1)
    expected_C = logps_C.cpu().double()[in_batch]
    lengths_C = torch.bincount(other.completion_of_M.cpu(), minlength=len(other.completion_index_C)).double()[in_other]
    difference_C = other_logps_C.cpu().double()[in_other] - expected_C
    return Comparison(difference_C, honest(lengths_C, expected_C, scale), lengths_C)


def gather(values: Tensor) -> list[float]:
    """Values of all ranks, in rank order. Collective."""
    return [value for share in all_gather_json(values.double().tolist()) for value in share]


def excess_of(comparisons: Sequence[Comparison]) -> list[float]:
    """Excess of several comparisons together. Collective."""
    return [value for one in comparisons for value in one.excess()]
