"""The flash-attn packages: where each has its function, which devices it is made for, and what it can do.

Facts from the packages' own sources: flash-attn 2.8.3 (with its `hopper` folder, which is flash-attn 3) and
flash-attn-4 4.0.0b36.
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from torch import Tensor


@dataclass(frozen=True)
class FlashPackage:
    """One of the packages that have a `flash_attn_varlen_func`; all are called by keyword, for positions differ."""

    name: str
    distribution: str  # as pip knows it
    module: str  # where the function is
    min_capability: tuple[int, int]  # of the CUDA device
    max_capability: tuple[int, int]
    has_sinks: bool
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

    def max_head_dim(self, capability: tuple[int, int]) -> int:
        """The largest head dimension it has a kernel for on a device."""
        return 128 if self is FLASH_4 and capability >= (10, 0) else 256


ANY = (99, 0)
FLASH_2 = FlashPackage("flash-attn 2", "flash-attn", "flash_attn", (8, 0), ANY, False, (-1, -1))
FLASH_3 = FlashPackage("flash-attn 3", "flash_attn_3", "flash_attn_interface", (9, 0), (9, 9), False, (-1, -1))
FLASH_4 = FlashPackage("flash-attn 4", "flash-attn-4", "flash_attn.cute", (9, 0), (11, 9), True, (None, None))

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
        if not package.min_capability <= capability <= package.max_capability:
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
