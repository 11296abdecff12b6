"""Which kernel a run takes, and why not a better one."""

from collections.abc import Sequence
from typing import Literal

import torch

from dpo_dist.attention.activation import find_activation
from dpo_dist.attention.limits import AttentionNeeds, KernelLimits
from dpo_dist.attention.packages import find_package
from dpo_dist.errors import ConfigError

# The fastest first; the last one runs everywhere.
BACKENDS = ("flash_attn", "torch", "sdpa")
# aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp; varlen_attn has no argument for softcap and sinks.
_TORCH = KernelLimits(256, has_softcap=False)

Determinism = bool | Literal["auto"]  # model.deterministic


def choose_backend(
    requested: str,
    device: torch.device,
    dtype: torch.dtype,
    needs: Sequence[AttentionNeeds],
    deterministic: Determinism = "auto",
) -> tuple[str, str]:
    """The kernel for `model.attn_implementation`, and why.

    Args:
        requested: the setting.
        device: what the run is on.
        dtype: what it computes in.
        needs: of every model of the run.
        deterministic: whether its backward must be; `auto`: flash-attn's, not torch's.

    Returns:
        What `register` takes (one of BACKENDS, or `torch+FA3`: torch with an activated package), and the reason.

    Raises:
        ConfigError: the requested kernel cannot run on this device, with this dtype or model, or is not installed.
    """
    if requested == "auto" and device.type != "cuda":
        return "sdpa", f"the only one on {device.type}"
    obstacles = find_obstacles(device, dtype, needs, deterministic)
    if requested != "auto":
        if obstacle := obstacles[requested]:
            raise ConfigError(
                f"model.attn_implementation={requested} {obstacle}; use auto, which picks the best kernel that works"
            )
        return _as_configured(requested, device, needs, deterministic)
    chosen = next(name for name, obstacle in obstacles.items() if obstacle is None)
    passed_over = [f"{name} {obstacles[name]}" for name in BACKENDS[: BACKENDS.index(chosen)]]
    return chosen, "; ".join(passed_over) or f"the fastest one, from {find_package(_capability(device))[1]}"


def find_obstacles(
    device: torch.device,
    dtype: torch.dtype,
    needs: Sequence[AttentionNeeds] = (),
    deterministic: Determinism = "auto",
) -> dict[str, str | None]:
    """Why a kernel cannot be taken, by its name, the fastest first; None of one that can be.

    Args:
        device, dtype, needs, deterministic: as of `choose_backend`; without needs what holds for every model.
    """
    return {name: _obstacle(name, device, dtype, needs, deterministic) for name in BACKENDS}


def _as_configured(
    requested: str, device: torch.device, needs: Sequence[AttentionNeeds], deterministic: Determinism
) -> tuple[str, str]:
    if requested == "flash_attn":
        return requested, f"as configured, from {find_package(_capability(device))[1]}"
    if requested == "torch":
        # Here alone: `auto` takes a package itself where it can, and does not give deterministic gradients up unasked.
        implementation, how = find_activation(_capability(device), needs, deterministic is True)
        return f"torch+{implementation}" if implementation else "torch", f"as configured, {how}"
    return requested, "as configured"


def _obstacle(
    name: str, device: torch.device, dtype: torch.dtype, needs: Sequence[AttentionNeeds], deterministic: Determinism
) -> str | None:
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
        return _TORCH.obstacle(needs)
    package, why = find_package(capability)
    if package is None:
        return why
    missing = package.limits(capability, deterministic is not False).obstacle(needs)
    return f"({package.name}) {missing}" if missing else None


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
