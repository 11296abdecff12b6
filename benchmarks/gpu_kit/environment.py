"""What machine, what versions, which kernels: python -m benchmarks.gpu_kit.environment OUT.json

A process of its own, so that the one that starts ranks holds no memory of a GPU.
"""

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.cuda import nccl

from dpo_dist.attention import AttentionNeeds, choose_backend
from dpo_dist.attention.choice import BACKENDS
from dpo_dist.attention.packages import PACKAGES, find_package
from dpo_dist.errors import ConfigError
from tests.launching import REPOSITORY

PACKAGE_NAMES = ("torch", "deepspeed", "transformers", "triton", "numpy", "safetensors", "trl")
VARIABLES = ("CUDA_VISIBLE_DEVICES", "NCCL_", "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32")
GOLDEN_HEAD_DIM = 8  # of tests/golden/tiny_policy


def report() -> dict[str, Any]:
    """Everything that can be known without starting ranks; null where there is nothing."""
    gpus = [_gpu(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    status = _output("git", "-C", str(REPOSITORY), "status", "--porcelain")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _output("git", "-C", str(REPOSITORY), "rev-parse", "HEAD"),
        "checkout_is_changed": None if status is None else bool(status),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGE_NAMES},
        "cuda": torch.version.cuda,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "nccl": ".".join(map(str, nccl.version())) if gpus else None,
        "flash_attn_packages": {p.distribution: p.installed_version() for p in PACKAGES},
        "flash_attn_taken": _flash_package() if gpus else "none: there is no GPU",
        "kernels": {name: _kernel(name, bool(gpus)) for name in BACKENDS},
        # TF32, which some containers switch on by a variable, is not float32: golden would say so.
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "variables": {key: value for key, value in os.environ.items() if key.startswith(VARIABLES)},
        "gpus": gpus,
        "topology": _output("nvidia-smi", "topo", "-m") if len(gpus) > 1 else None,
        "cpu": {"model": _cpu_model(), "cores": os.cpu_count(), "memory_gib": _memory_gib()},
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_gib": properties.total_memory / 2**30,
        "multiprocessors": properties.multi_processor_count,
    }


def _flash_package() -> str:
    package, reason = find_package(torch.cuda.get_device_capability(0))
    return package.name if package else f"none: {reason}"


def _kernel(name: str, has_gpu: bool) -> dict[str, Any]:
    """Whether the golden models can be computed by a kernel in bfloat16, and why (not)."""
    device = torch.device("cuda:0" if has_gpu else "cpu")
    try:
        _, reason = choose_backend(name, device, torch.bfloat16, [AttentionNeeds(GOLDEN_HEAD_DIM)])
    except ConfigError as error:
        return {"usable": False, "reason": str(error)}
    return {"usable": True, "reason": reason}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """What a command prints; None if it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(report()), encoding="utf-8")
