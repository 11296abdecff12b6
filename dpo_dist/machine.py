"""What this process asks of its machine: memory, and the same bits again."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch

from dpo_dist.control_groups import memory_of_container

# malloc.h: M_MMAP_THRESHOLD, below which blocks come from the heap; M_TRIM_THRESHOLD, what that keeps; M_TOP_PAD, what
# it takes at a time. In bytes.
_KEEPING = {-3: 1 << 30, -1: (1 << 31) - 1, -2: 64 << 20}


def free_bytes(device: torch.device, ranks_per_node: int) -> int:
    """Memory that this process may still take on its device.

    Args:
        device: where it computes. Memory of the CPU is shared out among the ranks of the machine.
        ranks_per_node: how many they are.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch uses it again
        return torch.cuda.mem_get_info(device)[0] + cached
    free, limit = psutil.virtual_memory().available // ranks_per_node, memory_of_container()
    if limit is None:
        return free
    return max(0, min(free, limit // ranks_per_node - psutil.Process().memory_info().rss))


def keep_freed_memory() -> None:
    """Let this process keep the memory of tensors that are gone for those that come next.

    glibc gives large blocks back at once, and the kernel hands out new ones page by page, emptied (mallopt(3)). With
    another allocator nothing happens.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for option, size in _KEEPING.items():
            libc.mallopt(option, size)


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Inside, if wanted, torch takes algorithms that give the same bits again, and warns where it has none."""
    if not wanted:
        yield
        return
    settings: Any = torch.utils.deterministic  # its attributes are made while it is imported
    fills = settings.fill_uninitialized_memory
    before, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Else every new tensor would be filled: it costs time, and none is read here before it is written.
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)
        settings.fill_uninitialized_memory = fills
