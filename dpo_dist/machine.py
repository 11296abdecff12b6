"""What this machine lets a process have: memory and cores."""

import ctypes
from pathlib import Path

import psutil
import torch

CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
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


def memory_of_container() -> int | None:
    """Bytes that the control groups of this process allow; None where they set no limit."""
    limits = [_read_number(folder / name) for folder, name in _group_files("memory", "memory.max", "limit_in_bytes")]
    # The first version of control groups writes almost 2^63 where there is no limit.
    known = [limit for limit in limits if limit is not None and limit < 1 << 60]
    return min(known, default=None)


def cores_of_container() -> float | None:
    """Cores' worth of time that the control groups of this process allow; None where they set no limit."""
    quotas = []
    for folder, name in _group_files("cpu", "cpu.max", "cfs_quota_us"):
        try:
            words = (folder / name).read_text().split()
            period = words[1] if len(words) > 1 else (folder / "cpu.cfs_period_us").read_text()
            quotas += [int(words[0]) / int(period)] if words[0].isdecimal() else []  # "max" and -1: no limit
        except (OSError, ValueError, IndexError, ZeroDivisionError):
            continue
    return min(quotas, default=None)


def _group_files(controller: str, second: str, first: str) -> list[tuple[Path, str]]:
    """Where a limit may stand: the groups that this process is in, and those above them, of both versions."""
    try:
        lines = OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return []
    places = []
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controllers and controller not in controllers.split(","):
            continue
        root, name = (CGROUPS / controller, f"{controller}.{first}") if controllers else (CGROUPS, second)
        own = root / path.lstrip("/")
        # A container sees its own group as the root, whatever its path is called.
        places += [(folder, name) for folder in (own, *own.parents) if folder.is_relative_to(root)]
    return places


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # not there, or "max"
        return None
