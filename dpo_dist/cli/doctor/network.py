"""Network interfaces and the variables that decide how ranks find each other."""

import socket
from collections.abc import Mapping

import psutil

from dpo_dist.cli.doctor.findings import Finding
from dpo_dist.cli.redaction import is_secret
from dpo_dist.distributed import require_announced
from dpo_dist.errors import ConfigError

SECTION = "network"
_NAMES = frozenset(
    "MASTER_ADDR MASTER_PORT WORLD_SIZE RANK LOCAL_RANK LOCAL_WORLD_SIZE LOCAL_SIZE GROUP_RANK CUDA_VISIBLE_DEVICES "
    "CUDA_HOME HF_HOME HF_HUB_CACHE HF_HUB_OFFLINE HF_DATASETS_OFFLINE TRANSFORMERS_OFFLINE HF_ENDPOINT "
    "OMP_NUM_THREADS TORCH_EXTENSIONS_DIR TORCH_CUDA_ARCH_LIST DPO_DIST_CACHE XDG_CACHE_HOME "
    "PYTORCH_CUDA_ALLOC_CONF PYTORCH_ALLOC_CONF DS_ACCELERATOR LD_PRELOAD CXX "
    "SLURM_JOB_ID SLURM_JOB_NODELIST SLURM_NNODES SLURM_NTASKS SLURM_PROCID".split()
)
_PREFIXES = ("NCCL_", "TORCH_NCCL_", "GLOO_", "TORCH_DISTRIBUTED_", "TORCHELASTIC_", "FI_", "UCX_")


def network_findings(environment: Mapping[str, str]) -> list[Finding]:
    """Interfaces, the variables that name them, the address of the first rank, and all variables that matter.

    Args:
        environment: of this process.
    """
    interfaces = _interfaces()
    return [
        *interfaces.values(),
        *_named_interfaces(environment, list(interfaces)),
        *_launcher(environment),
        *_first_rank(environment),
        _variables(environment),
    ]


def traffic_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that say how NCCL and gloo send, which mostly must be the same on all ranks."""
    beginnings = ("NCCL_", "TORCH_NCCL_", "GLOO_")
    return {name: value for name, value in environment.items() if name.startswith(beginnings) and not is_secret(name)}


def _interfaces() -> dict[str, Finding]:
    stats, found = psutil.net_if_stats(), {}
    for name, addresses in psutil.net_if_addrs().items():
        is_up = name in stats and stats[name].isup
        own = [one.address for one in addresses if one.family in (socket.AF_INET, socket.AF_INET6)]
        text = f"{'up' if is_up else 'down'}, {', '.join(own) or 'no address'}"
        found[name] = Finding(SECTION, f"interface {name}", text, values={"up": is_up, "addresses": own})
    return found


def _named_interfaces(environment: Mapping[str, str], interfaces: list[str]) -> list[Finding]:
    """An interface that is named and not there: the ranks of this machine would find nobody."""
    findings = []
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        wanted = environment.get(variable, "")
        if not wanted or _matches(variable, wanted, interfaces):
            continue
        findings.append(
            Finding(
                SECTION,
                variable,
                f"{variable}={wanted} names no interface of this machine, which has {', '.join(interfaces)}",
                "problem",
                f"set {variable} to one of them, or unset it",
            )
        )
    return findings


def _matches(variable: str, wanted: str, interfaces: list[str]) -> bool:
    """Whether there is an interface for it: gloo takes names, NCCL beginnings, `=` names, or `^` what to leave out."""
    names = wanted.removeprefix("^").removeprefix("=").split(",")
    if variable.startswith("GLOO") or wanted.startswith("="):
        return any(name in interfaces for name in names)
    begun = [any(interface.startswith(name) for name in names) for interface in interfaces]
    if wanted.startswith("^"):
        return wanted.startswith("^=") or not all(begun)
    return any(begun)


def _launcher(environment: Mapping[str, str]) -> list[Finding]:
    """What every launcher sets, if one was used, or somebody in its place."""
    if "WORLD_SIZE" not in environment or "MASTER_ADDR" not in environment:
        return []
    try:
        require_announced(environment)
    except ConfigError as error:
        way_out = "start ranks with torchrun, deepspeed or launch/slurm.sbatch, or unset WORLD_SIZE for one process"
        return [Finding(SECTION, "launcher", str(error), "problem", way_out)]
    text = f"rank {environment['RANK']} of {environment['WORLD_SIZE']}"
    if environment["WORLD_SIZE"] != "1" and "LOCAL_RANK" not in environment:
        way_out = "set LOCAL_RANK and LOCAL_WORLD_SIZE, as torchrun and deepspeed do, if a machine has several ranks"
        text += "; LOCAL_RANK is not set: all ranks of a machine would take its first GPU"
        return [Finding(SECTION, "launcher", text, "warning", way_out)]
    return [Finding(SECTION, "launcher", text)]


def _first_rank(environment: Mapping[str, str]) -> list[Finding]:
    address = environment.get("MASTER_ADDR")
    if not address:
        return []
    try:
        found = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(address, None)})
    except OSError as error:
        return [
            Finding(
                SECTION,
                "MASTER_ADDR",
                f"MASTER_ADDR={address} is not known here ({error})",
                "problem",
                "give the launcher a name or an address of the first node that this machine can look up",
            )
        ]
    return [Finding(SECTION, "MASTER_ADDR", f"{address} is {', '.join(found)}", values={"addresses": found})]


def _variables(environment: Mapping[str, str]) -> Finding:
    shown = {
        name: value
        for name, value in sorted(environment.items())
        if (name in _NAMES or name.startswith(_PREFIXES)) and not is_secret(name)
    }
    text = " ".join(f"{name}={value}" for name, value in shown.items()) or "none of those that matter is set"
    return Finding(SECTION, "variables", text, values=shown)
