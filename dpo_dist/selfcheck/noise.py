"""What rounding explains of the difference between two evaluations of the same completions.

    C completions   B preference pairs

The bounds are measured: docs/decisions/0003-self-check-bounds.md says what, and how to measure them again.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dpo_dist.batch import MicroBatch
from dpo_dist.distributed import all_gather_json

# How far two honest evaluations of one completion's log-probability are apart (rms), in nats per sqrt(token).
NOISE_PER_SQRT_TOKEN = {torch.bfloat16: 0.03, torch.float16: 0.004, torch.float32: 1e-5, torch.float64: 1e-12}
# Adding n equal values up in float32 rounds n times: two such sums with independent roundings differ by 0.3 sqrt(n)
# roundings of the total. In float32 this is the larger part from about 100 tokens on.
SUM_NOISE = 0.3 * torch.finfo(torch.float32).eps
RMS_LIMIT = 3.0  # times the honest noise, of all completions that are compared
LARGEST_LIMIT = 8.0  # times the honest noise, of a single one


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


def honest(lengths_C: Tensor, logps_C: Tensor, scale: float) -> Tensor:
    """What rounding explains of a difference between two evaluations (rms), nats: of the tokens, and of their sum."""
    return lengths_C.sqrt() * (scale + SUM_NOISE * logps_C.abs())


def gather(values: Tensor) -> list[float]:
    """Values of all ranks, in rank order. Collective."""
    return [value for share in all_gather_json(values.double().tolist()) for value in share]


def rms(values: Sequence[float]) -> float:
    """Root mean square; 0 of nothing."""
    return math.sqrt(sum(value * value for value in values) / len(values)) if values else 0.0


def is_rounding(excess: Sequence[float]) -> bool:
    """Whether differences in units of honest noise are no more than that; nothing is."""
    # `not above`, so that a NaN is no rounding.
    return not excess or (max(map(abs, excess)) <= LARGEST_LIMIT and rms(excess) <= RMS_LIMIT)


def excess_of(comparisons: Sequence[Comparison]) -> list[float]:
    """Excess of several comparisons together. Collective."""
    return [value for one in comparisons for value in one.excess()]


def describe(excess: Sequence[float]) -> str:
    """How large differences are, for a message."""
    largest = max(map(abs, excess))
    return (
        f"rms {rms(excess):.2g} times what rounding explains, largest {largest:.2g}; "
        f"allowed {RMS_LIMIT:g} and {LARGEST_LIMIT:g}"
    )
