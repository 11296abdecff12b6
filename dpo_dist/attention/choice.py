"""Which kernel a run takes, and why not a better one."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dpo_dist.attention.packages import find_package
from dpo_dist.errors import ConfigError

# The fastest first; the last one runs everywhere.
BACKENDS = ("flash_attn", "torch", "sdpa")
_TORCH_MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class AttentionNeeds:
    """What a model asks of its attention kernel."""

    head_dim: int
    has_softcap: bool = False
    has_sinks: bool = False


def choose_backend(
    requested: str, device: torch.device, dtype: torch.dtype, needs: Sequence[AttentionNeeds]
) -> tuple[str, str]:
    """The kernel for `model.attn_implementation`, and why.

    Args:
        requested: the setting.
        device: what the run is on.
        dtype: what it computes in.
        needs: of every model of the run.
    Raises:
        ConfigError: the requested kernel cannot run on this device, with this dtype or model, or is not installed.
    """
    if requested == "auto" and device.type != "cuda":
        return "sdpa", f"the only one on {device.type}"
    obstacles = {name: _obstacle(name, device, dtype, needs) for name in BACKENDS}
    if requested != "auto":
        if obstacle := obstacles[requested]:
            raise ConfigError(
                f"model.attn_implementation={requested} {obstacle}; use auto, which picks the best kernel that works"
            )
        return requested, f"as configured{_which(requested, device)}"
    chosen = next(name for name, obstacle in obstacles.items() if obstacle is None)
    passed_over = [f"{name} {obstacles[name]}" for name in BACKENDS[: BACKENDS.index(chosen)]]
    return chosen, "; ".join(passed_over) or f"the fastest one{_which(chosen, device)}"


def _which(backend: str, device: torch.device) -> str:
    return f", from {find_package(_capability(device))[1]}" if backend == "flash_attn" else ""


def _obstacle(name: str, device: torch.device, dtype: torch.dtype, needs: Sequence[AttentionNeeds]) -> str | None:
    if name == "sdpa":
        return None
    if device.type != "cuda":
        return f"needs a CUDA device, and this run is on {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"computes in bfloat16 or float16 only, and model.dtype is {str(dtype).removeprefix('torch.')}"
    capability = _capability(device)
    if capability < (8, 0):
        return f"needs a device of compute capability 8.0 or higher, and this one has {capability[0]}.{capability[1]}"
    if name == "torch":
        return _missing(needs, _TORCH_MAX_HEAD_DIM, has_softcap=False, has_sinks=False)
    package, why = find_package(capability)
    if package is None:
        return why
    missing = _missing(needs, package.max_head_dim(capability), has_softcap=True, has_sinks=package.has_sinks)
    return f"({package.name}) {missing}" if missing else None


def _missing(needs: Sequence[AttentionNeeds], max_head_dim: int, has_softcap: bool, has_sinks: bool) -> str | None:
    for need in needs:
        if need.head_dim > max_head_dim or need.head_dim % 8:
            return f"has no kernel for heads of dimension {need.head_dim} (multiples of 8 up to {max_head_dim})"
    if any(need.has_softcap for need in needs) and not has_softcap:
        return "has no softcap, which the model's architecture needs"
    if any(need.has_sinks for need in needs) and not has_sinks:
        return "has no attention sinks, which the model's architecture needs"
    return None


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
