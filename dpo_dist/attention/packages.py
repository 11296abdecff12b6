"""The flash-attn packages: where each has its function, which devices it is made for, and what it can do there.

Facts from the packages' own sources. flash-attn 2 and its `hopper` folder, which is flash-attn 3: 2.8.3.post2;
flash-attn 3's C++, which no release holds: its repository at 01d6dd1; flash-attn-4: 4.0.0b36.
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from torch import Tensor

from dpo_dist.attention.limits import KernelLimits


@dataclass(frozen=True)
class FlashPackage:
    """One of the packages that have a `flash_attn_varlen_func`; all are called by keyword, for positions differ."""

    name: str
    distribution: str  # as pip knows it
    module: str  # where the function is
    generations: tuple[int, ...]  # of CUDA devices: the first number of their compute capability
    no_window: tuple[int | None, int | None]  # how it writes that there is no window

    def installed_version(self) -> str | None:
        """None if it is not installed."""
        try:
            return version(self.distribution)
        except PackageNotFoundError:
            return None

    def function(self) -> Callable[..., Tensor | tuple[Tensor, ...]]:
        """Its `flash_attn_varlen_func`.

        Raises:
            ImportError: it is not there, or its compiled part does not fit to this torch.
        """
        return importlib.import_module(self.module).flash_attn_varlen_func

    def limits(self, capability: tuple[int, int], deterministic: bool = True) -> KernelLimits:
        """What it can do on a device, forward and backward; with a backward that is deterministic, or with any."""
        if self is FLASH_3 and not deterministic:
            return KernelLimits(256)
        if self is FLASH_3:
            # hopper/flash_api_stable.cpp, mha_bwd: heads above 192 are rounded up to 256, and there "deterministic" is
            # refused. Builds from before that check took the flag and ignored it.
            return KernelLimits(192, kernel="deterministic backward kernel")
        if self is FLASH_4:
            return _FLASH_4_ON_9 if capability < (10, 0) else _FLASH_4_ON_10
        # csrc/flash_attn/flash_api.cpp:604 and :1046. Devices of 8.6 and 8.9 lack 256 with dropout only
        # (src/flash_bwd_launch_template.h:300), and there is none here.
        return KernelLimits(256)


# flash_attn/cute/interface.py:129, _validate_head_dims. With grouped heads the backward wants values as wide as keys
# (flash_bwd_sm90.py:116); filled up, they always are.
_FLASH_4_ON_9 = KernelLimits(256, has_sinks=True)
# interface.py:125-138. The backward for 256 is a kernel of its own (interface.py:2437), which is deterministic and has
# no window (sm100_hd256_2cta_fmha_backward.py:60), no softcap (interface.py:2958) and no sinks (interface.py:2454).
_FLASH_4_ON_10 = KernelLimits(128, further_dims=((192, 128), (256, 256)), plain_dim=256, has_sinks=True)

# setup.py:70 and :179-191: 2 is compiled for 8, 9, 10 and 12, with no code that another generation could run.
FLASH_2 = FlashPackage("flash-attn 2", "flash-attn", "flash_attn", (8, 9, 10, 12), (-1, -1))
FLASH_3 = FlashPackage("flash-attn 3", "flash_attn_3", "flash_attn_interface", (9,), (-1, -1))
# interface.py:2288 and :2352: a backward on 9 to 12, and a deterministic one on 9 to 11.
FLASH_4 = FlashPackage("flash-attn 4", "flash-attn-4", "flash_attn.cute", (9, 10, 11), (None, None))

# The fastest first, where several are made for a device.
PACKAGES = (FLASH_3, FLASH_4, FLASH_2)


@functools.cache
def find_package(capability: tuple[int, int]) -> tuple[FlashPackage | None, str]:
    """The installed package to take on a device, or None and why there is none."""
    if FLASH_2.installed_version() and FLASH_4.installed_version():
        return None, (
            "cannot tell flash-attn from flash-attn-4: both are installed, and each overwrites files of the other; "
            "uninstall both, then install one"
        )
    reasons = []
    for package in PACKAGES:
        if package.installed_version() is None:
            continue
        if capability[0] not in package.generations:
            reasons.append(f"{package.name} is not made for compute capability {capability[0]}.{capability[1]}")
            continue
        try:
            package.function()
        except (ImportError, AttributeError, OSError) as error:
            reasons.append(f"{package.name} is installed and cannot be imported ({error})")
            continue
        return package, package.name
    return None, "; ".join(
        reasons
    ) or "needs the package flash-attn, flash-attn-3 or flash-attn-4, and none is installed"
