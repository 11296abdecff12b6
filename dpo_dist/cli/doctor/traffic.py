"""What is measured between ranks: moments around barriers, and seconds of all-reduces. NCCL has not been tried."""

import statistics
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from dpo_dist.distributed import barrier

ROUNDS = 20  # barriers; the clocks are known as well as the fastest of them allows
REPEATS = 5
_WARM_UP = 2
SIZES = {  # bytes by device
    "cpu": (4 << 10, 64 << 10, 1 << 20, 16 << 20),
    "cuda": (64 << 10, 1 << 20, 16 << 20, 256 << 20),
}
_FLOAT_BYTES = 4


def time_barriers() -> list[list[float]]:
    """What this rank's clock says when it gets to each of some barriers and when it leaves it; seconds. Collective."""
    moments = []
    for _ in range(ROUNDS):
        entered = time.time()
        barrier()
        moments.append([entered, time.time()])
    return moments


def time_all_reduces(device: torch.device) -> dict[str, dict[str, float | bool]]:
    """By number of bytes, the median seconds of an all-reduce, and whether its sum was right. Collective.

    Args:
        device: where the tensors are: this decides between gloo and NCCL.
    """
    return {str(size): _time_all_reduce(size, device) for size in SIZES[device.type]}


def _time_all_reduce(size: int, device: torch.device) -> dict[str, float | bool]:
    world_size = dist.get_world_size()
    values = torch.full((size // _FLOAT_BYTES,), float(dist.get_rank() + 1), device=device)
    dist.all_reduce(values)
    is_right = bool((values == world_size * (world_size + 1) / 2).all())
    seconds = []
    for _ in range(_WARM_UP + REPEATS):
        values.zero_()  # sums of sums would overflow
        barrier()
        _wait_for(device)
        started = time.perf_counter()
        dist.all_reduce(values)
        _wait_for(device)
        seconds.append(time.perf_counter() - started)
    return {"seconds": statistics.median(seconds[_WARM_UP:]), "is_right": is_right}


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bandwidths(size: int, seconds: float, num_ranks: int) -> tuple[float, float]:
    """Algorithm and bus bandwidth of an all-reduce, in bytes per second, as nccl-tests define them.

    The bus bandwidth is what a ring has to send over each link, 2 (n - 1) / n of the tensor: it can be compared with
    that of the hardware, whatever the number of ranks n.

    Args:
        size: of the tensor of each rank, in bytes.
        seconds: of one all-reduce.
        num_ranks: n; with 1 nothing is sent, and the bus bandwidth is 0.
    """
    algorithm = size / seconds
    return algorithm, algorithm * 2 * (num_ranks - 1) / num_ranks


def clock_offset(first: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> tuple[float, float]:
    """By how much another rank's clock is ahead of the first one's, and how far off that may be; seconds.

    Nobody leaves a barrier before everybody has got there. So in true time the other one came before the first one
    left, and the first one before the other one left: each barrier bounds the offset from both sides, and what is
    within the bounds of all of them is what is possible.

    Args:
        first, other: of each barrier the moments of entering and leaving, by that rank's clock.
    """
    pairs = list(zip(first, other, strict=True))
    low = max(theirs[0] - mine[1] for mine, theirs in pairs)
    high = min(theirs[1] - mine[0] for mine, theirs in pairs)
    return (low + high) / 2, abs(high - low) / 2
