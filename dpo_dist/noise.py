"""What rounding explains of the difference between two evaluations of the same completions (C of them).

The bounds are measured: docs/decisions/0003-self-check-bounds.md says what, and how to measure them again.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# How far two honest evaluations of one completion's log-probability are apart (rms), in nats per sqrt(token).
NOISE_PER_SQRT_TOKEN = {torch.bfloat16: 0.03, torch.float16: 0.004, torch.float32: 1e-5, torch.float64: 1e-12}
# Adding n equal values up in float32 rounds n times: two such sums with independent roundings differ by 0.3 sqrt(n)
# roundings of the total. In float32 this is the larger part from about 100 tokens on.
SUM_NOISE = 0.3 * torch.finfo(torch.float32).eps
RMS_LIMIT = 3.0  # times the honest noise, of all completions that are compared
LARGEST_LIMIT = 8.0  # times the honest noise, of a single one


def honest(lengths_C: Tensor, logps_C: Tensor, scale: float) -> Tensor:
    """What rounding explains of a difference between two evaluations (rms), nats: of the tokens, and of their sum."""
    return lengths_C.sqrt() * (scale + SUM_NOISE * logps_C.abs())


def rms(values: Sequence[float]) -> float:
    """Root mean square; 0 of nothing."""
    return math.sqrt(sum(value * value for value in values) / len(values)) if values else 0.0


def is_rounding(excess: Sequence[float]) -> bool:
    """Whether differences in units of honest noise are no more than that; nothing is."""
    # `not above`, so that a NaN is no rounding.
    return not excess or (max(map(abs, excess)) <= LARGEST_LIMIT and rms(excess) <= RMS_LIMIT)


def describe(excess: Sequence[float]) -> str:
    """How large differences are, for a message."""
    largest = max(map(abs, excess))
    return (
        f"rms {rms(excess):.2g} times what rounding explains, largest {largest:.2g}; "
        f"allowed {RMS_LIMIT:g} and {LARGEST_LIMIT:g}"
    )
