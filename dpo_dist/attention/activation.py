"""flash-attn 3 or 4 in the place of torch's own kernels, for the backend `torch`.

torch.nn.attention.activate_flash_attention_impl registers a package's kernels over aten::_flash_attention_forward and
_backward, which varlen_attn calls, and over those of scaled_dot_product_attention: for the whole process, until they
are taken back. Facts from torch 2.13 (torch/nn/attention/_registry.py, _fa3.py, _fa4.py).
"""

import importlib
import inspect
import typing
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.nn.attention import (
    activate_flash_attention_impl,
    current_flash_attention_impl,
    restore_flash_attention_impl,
)

from dpo_dist.attention.limits import AttentionNeeds
from dpo_dist.attention.packages import FLASH_3, FLASH_4, FlashPackage, find_package

# What torch calls a package, and the devices it lets it run on: _fa3.py:152, _fa4.py:121.
_IN_TORCH = {FLASH_3: ("FA3", (9,)), FLASH_4: ("FA4", (9, 10))}


def find_activation(
    capability: tuple[int, int], needs: Sequence[AttentionNeeds], deterministic: bool
) -> tuple[str | None, str]:
    """What torch can be given in the place of its own kernels on a device, or None; and what that means, in words."""
    package, why = find_package(capability)
    if package is None:
        return None, f"with torch's own flash-attn 2: {why}"
    if package not in _IN_TORCH:
        return None, f"with torch's own flash-attn 2, as the installed package is {package.name} too"
    name, generations = _IN_TORCH[package]
    if capability[0] not in generations:
        return None, f"with torch's own flash-attn 2: it takes {package.name} on other devices only"
    # torch asks for a deterministic backward only if it is told to be deterministic: _fa3.py:592.
    limits = package.limits(capability, deterministic)
    if reason := _misfit(package) or limits.obstacle([_as_torch_asks(need) for need in needs]):
        return None, f"with torch's own flash-attn 2: {package.name} {reason}"
    return name, f"with {package.name} activated in torch"


def activate(implementation: str | None) -> None:
    """Put an implementation in the place of torch's own kernels; None puts torch's own back."""
    if current_flash_attention_impl() == implementation:
        return
    if current_flash_attention_impl() is not None:
        restore_flash_attention_impl()
    if implementation is not None:
        activate_flash_attention_impl(implementation)


def _misfit(package: FlashPackage) -> str | None:
    """What torch would stumble over at the first call."""
    if package is FLASH_3:
        has_both = all(hasattr(torch.ops.flash_attn_3, name) for name in ("fwd", "bwd"))
        return None if has_both else "registers no kernels with torch"
    forward = getattr(importlib.import_module("flash_attn.cute.interface"), "_flash_attn_fwd", None)
    # _fa4.py:226 unpacks two results. Those of 4.0.0b36 are five (interface.py:720), which its annotation tells.
    if forward is None or len(typing.get_args(inspect.signature(forward).return_annotation)) != 2:
        return f"does not return what torch {torch.__version__} expects of it"
    return None


def _as_torch_asks(need: AttentionNeeds) -> AttentionNeeds:
    return replace(need, value_head_dim=None)  # `torch_attention` fills values up to the width of keys
