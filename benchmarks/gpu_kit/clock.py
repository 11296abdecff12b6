"""Seconds of a call on a device, alone or on all ranks at once."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

WARM_UP, REPEATS = 3, 10


def median_seconds(call: Callable[[], Any], device: torch.device, before: Callable[[], Any] = lambda: None) -> float:
    """The median of `REPEATS`; the host waits for the device before and after each.

    Args:
        call: what is measured.
        device: that it runs on.
        before: called before each one, and not measured.
    """
    seconds = []
    for repeat in range(WARM_UP + REPEATS):
        _wait_for(device)
        before()
        started = time.perf_counter()
        call()
        _wait_for(device)
        if repeat >= WARM_UP:
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def seconds_of_ranks(call: Callable[[], Any], device: torch.device) -> float:
    """The same of the slowest rank; all begin together."""
    slowest = torch.tensor(median_seconds(call, device, dist.barrier), dtype=torch.float64, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
