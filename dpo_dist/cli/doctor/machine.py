"""The machine without its accelerators: cores, memory, limits of the process, what it takes to compile."""

import os
import resource
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import psutil

from dpo_dist.checkpoint import human_bytes
from dpo_dist.cli.doctor.findings import Finding
from dpo_dist.control_groups import cores_of_container, memory_of_container

SECTION = "machine"
INFINIBAND = Path("/sys/class/infiniband")
SHARED_MEMORY = Path("/dev/shm")
_SMALL_SHARED_MEMORY = 1 << 30  # bytes; Docker gives 64 MiB unasked
_FEW_FILES, _FILES_OF_A_PEER = 1024, 8


def machine_findings(environment: Mapping[str, str]) -> list[Finding]:
    """All that this file looks at.

    Args:
        environment: of this process.
    """
    num_ranks, local_ranks = count_of(environment, "WORLD_SIZE"), ranks_here(environment)
    return [
        _cores(environment, local_ranks),
        _memory(),
        *_shared_memory(),
        *_locked_memory(),
        _open_files(num_ranks),
        _compiler(environment),
    ]


def count_of(environment: Mapping[str, str], name: str) -> int:
    """The number that a launcher has set; 1 where there is none."""
    value = environment.get(name, "")
    return int(value) if value.isdecimal() else 1


def ranks_here(environment: Mapping[str, str]) -> int:
    """Ranks that the launcher has started on this machine; the second name is that of DeepSpeed's launcher."""
    return count_of(environment, "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in environment else "LOCAL_SIZE")


def _cores(environment: Mapping[str, str], local_ranks: int) -> Finding:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cores_of_container()
    cores = min(float(usable), quota or float(usable))
    said = f"{usable} of {os.cpu_count()} may be used"
    said += f"; the container may use {quota:g}" if quota is not None else ""
    threads = environment.get("OMP_NUM_THREADS")
    values = {"usable": usable, "container_limit": quota, "ranks_here": local_ranks}
    if local_ranks > cores:
        return Finding(
            SECTION,
            "CPU cores",
            f"{said}, and {local_ranks} ranks share them",
            "warning",
            "start fewer ranks on this machine, or give it more cores: ranks wait for each other actively",
            values,
        )
    return Finding(SECTION, "CPU cores", f"{said}; OMP_NUM_THREADS is {threads or 'not set'}", values=values)


def _memory() -> Finding:
    memory, limit = psutil.virtual_memory(), memory_of_container()
    said = f"{human_bytes(memory.available)} of {human_bytes(memory.total)} available"
    values = {"total_bytes": memory.total, "available_bytes": memory.available, "container_limit_bytes": limit}
    if limit is not None and limit < memory.total:
        said += f"; the container may use {human_bytes(limit)}"
    return Finding(SECTION, "memory", said, values=values)


def _shared_memory() -> list[Finding]:
    if not SHARED_MEMORY.is_dir():
        return []
    usage = shutil.disk_usage(SHARED_MEMORY)
    said = f"{human_bytes(usage.free)} of {human_bytes(usage.total)} free"
    values = {"total_bytes": usage.total, "free_bytes": usage.free}
    if usage.free >= _SMALL_SHARED_MEMORY:
        return [Finding(SECTION, "shared memory", f"{SHARED_MEMORY}: {said}", values=values)]
    return [
        Finding(
            SECTION,
            "shared memory",
            f"{SHARED_MEMORY}: {said}; NCCL and DeepSpeed pass data between ranks of one machine through it",
            "warning",
            "start the container with --shm-size=8g or --ipc=host; outside of one, remove what fills it",
            values,
        )
    ]


def _locked_memory() -> list[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    has_infiniband = INFINIBAND.is_dir() and any(INFINIBAND.iterdir())
    values = {"soft_bytes": _number(soft), "hard_bytes": _number(hard), "infiniband": has_infiniband}
    said = "unlimited" if soft == resource.RLIM_INFINITY else human_bytes(soft)
    if has_infiniband and soft != resource.RLIM_INFINITY:
        return [
            Finding(
                SECTION,
                "locked memory",
                f"{said} (RLIMIT_MEMLOCK), and this machine has InfiniBand, which locks what it sends",
                "warning",
                "ulimit -l unlimited, or start the container with --ulimit memlock=-1",
                values,
            )
        ]
    return [Finding(SECTION, "locked memory", f"{said} (RLIMIT_MEMLOCK)", values=values)]


def _open_files(num_ranks: int) -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FEW_FILES + _FILES_OF_A_PEER * num_ranks
    values = {"soft": _number(soft), "hard": _number(hard)}
    if soft != resource.RLIM_INFINITY and soft < (wanted if num_ranks > 1 else _FEW_FILES):
        return Finding(
            SECTION,
            "open files",
            f"{soft} (RLIMIT_NOFILE); every other rank takes some, besides the shards of weights and data",
            "warning",
            f"ulimit -n {wanted}, or start the container with --ulimit nofile={wanted}",
            values,
        )
    said = "unlimited" if soft == resource.RLIM_INFINITY else str(soft)
    return Finding(SECTION, "open files", f"{said} (RLIMIT_NOFILE)", values=values)


def _compiler(environment: Mapping[str, str]) -> Finding:
    """DeepSpeed compiles its optimizer at its first use; what `launch/setup.sh` requires."""
    compiler = environment.get("CXX") or "g++"
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    missing = [f"the compiler {compiler}"] if shutil.which(compiler) is None else []
    missing += [] if headers.is_file() else [f"{headers}"]
    has_ninja = find_spec("ninja") is not None or shutil.which("ninja") is not None
    missing += [] if has_ninja else ["ninja"]
    if missing:
        return Finding(
            SECTION,
            "compiler",
            f"{' and '.join(missing)} not found; DeepSpeed compiles an operator at its first use on a machine",
            "warning",
            "install g++ (or set CXX), the headers of Python (python3-dev) and ninja, unless the operator is "
            "compiled already (TORCH_EXTENSIONS_DIR)",
            {"missing": missing},
        )
    return Finding(SECTION, "compiler", f"{compiler}, headers of Python {sys.version_info.major}, ninja")


def _number(limit: int) -> int | None:
    return None if limit == resource.RLIM_INFINITY else limit
