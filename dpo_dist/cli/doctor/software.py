"""Packages, accelerators and attention kernels. What depends on a GPU has not been run on one."""

import sys
import warnings
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch.cuda import nccl

from dpo_dist import __version__
from dpo_dist.attention import choose_backend, find_obstacles
from dpo_dist.attention.packages import PACKAGES
from dpo_dist.checkpoint import human_bytes
from dpo_dist.cli.doctor.findings import Finding
from dpo_dist.cli.doctor.machine import ranks_here

SECTION = "software"
REQUIRED = (
    *("torch", "deepspeed", "transformers", "accelerate", "peft", "tokenizers", "huggingface_hub", "datasets"),
    *("safetensors", "numpy", "pyarrow"),
)
DRIVER = Path("/proc/driver/nvidia/version")
_INSTALL = "pip install -c constraints.txt . installs the versions that were tested"


def installed_versions() -> dict[str, str]:
    """Versions of all that decides what a run computes, by package; "" of what is not installed."""
    found = {"python": ".".join(map(str, sys.version_info[:3])), "dpo_dist": __version__}
    found |= {name: _version_of(name) for name in REQUIRED}
    found |= {package.distribution: package.installed_version() or "" for package in PACKAGES}
    found["CUDA"] = torch.version.cuda or ""
    # The build of torch is part of its version where pip does not know it.
    found["torch"] = torch.__version__
    return found


def software_findings(environment: Mapping[str, str]) -> list[Finding]:
    """Versions, accelerators, and the attention kernels that work here.

    Args:
        environment: of this process.
    """
    return [*_versions(), *_accelerators(environment), *_kernels()]


def _version_of(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _versions() -> list[Finding]:
    found = installed_versions()
    findings = []
    for name in ("python", "dpo_dist", *REQUIRED):
        if found[name]:
            findings.append(Finding(SECTION, name, found[name], values={"version": found[name]}))
        else:
            findings.append(Finding(SECTION, name, "not installed", "problem", _INSTALL, {"version": None}))
    for package in PACKAGES:
        own = found[package.distribution]
        findings.append(Finding(SECTION, package.name, own or "not installed", values={"version": own or None}))
    of_nccl = ".".join(map(str, nccl.version())) if torch.version.cuda else None
    cuda = f"CUDA {torch.version.cuda}, NCCL {of_nccl}" if of_nccl else "torch is built without CUDA"
    return [*findings, Finding(SECTION, "CUDA", cuda, values={"cuda": torch.version.cuda, "nccl": of_nccl})]


def _accelerators(environment: Mapping[str, str]) -> list[Finding]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        is_available = torch.cuda.is_available()
    if not is_available:
        return [_without_accelerator(environment, [str(one.message).splitlines()[0] for one in said])]
    count = torch.cuda.device_count()
    findings = [_device(index) for index in range(count)]
    wanted = ranks_here(environment)
    if wanted > count:
        findings.append(
            Finding(
                SECTION,
                "GPUs for ranks",
                f"{wanted} ranks on this machine, and {count} to compute on",
                "problem",
                f"start at most {count} ranks here (--nproc-per-node), or correct CUDA_VISIBLE_DEVICES",
            )
        )
    return findings


def _device(index: int) -> Finding:
    device = torch.cuda.get_device_properties(index)
    capability = f"{device.major}.{device.minor}"
    values = {"name": device.name, "memory_bytes": device.total_memory, "compute_capability": capability}
    text = f"{device.name}, {human_bytes(device.total_memory)}, compute capability {capability}"
    return Finding(SECTION, f"accelerator {index}", text, values=values)


def _without_accelerator(environment: Mapping[str, str], said: list[str]) -> Finding:
    """Nothing to compute on but the CPU: as it should be, or in spite of a GPU."""
    text, detail = "none: runs on CPU", f" ({said[0]})" if said else ""
    # DeepSpeed's launcher sets it on a machine without any.
    if environment.get("CUDA_VISIBLE_DEVICES") and "LOCAL_SIZE" not in environment:
        return Finding(
            SECTION,
            "accelerators",
            f"none, and CUDA_VISIBLE_DEVICES={environment['CUDA_VISIBLE_DEVICES']} asks for some{detail}",
            "problem",
            "correct or unset CUDA_VISIBLE_DEVICES, or install a build of torch for CUDA that the driver can run",
        )
    if DRIVER.is_file():
        why = "torch is built without CUDA" if torch.version.cuda is None else f"torch finds no device{detail}"
        return Finding(
            SECTION,
            "accelerators",
            f"{text}, though this machine has an NVIDIA driver: {why}",
            "warning",
            "install a build of torch for a CUDA version that the driver can run, and give the container its devices",
        )
    return Finding(SECTION, "accelerators", text)


def _kernels() -> list[Finding]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    obstacles = find_obstacles(device, torch.bfloat16)
    chosen, why = choose_backend("auto", device, torch.bfloat16, [])
    usable = [name for name, obstacle in obstacles.items() if obstacle is None]
    text = f"{', '.join(usable)}; auto takes {chosen}: {why}"
    return [Finding(SECTION, "attention kernels", text, values={"usable": usable, "obstacles": obstacles})]
