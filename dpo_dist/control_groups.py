"""What the control groups of a container let a process have: memory and cores. Needs no torch."""

import os
from pathlib import Path

CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def usable_cores() -> int:
    """How many processes may compute at once: the cores given to this process, within the container's limit."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cores_of_container()
    return usable if quota is None else max(1, min(usable, int(quota)))


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
