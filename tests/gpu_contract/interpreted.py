"""Kernels of flash-attn and Liger on the CPU, in Triton's interpreter.

Of flash-attn it is the Triton backend: the interface, the layout of arguments and the semantics (bottom-right causal,
windows, GQA, empty segments, gradients) are the package's own; its CUDA kernels are other code. Liger's kernels are the
ones that a GPU runs. bfloat16 is not right in the interpreter. Must be imported before torch in a process of its own:
Triton decides when it is imported, and functions of torch and Triton are replaced.
"""

import contextlib
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

PACKAGES = Path(sys.prefix) / ".dpo_dist" / "gpu_contract"  # put there by launch/setup.sh


def activate() -> None:
    """Make `flash_attn.flash_attn_varlen_func` compute on CPU tensors.

    Raises:
        RuntimeError: the packages are not installed.
    """
    _find_packages()
    os.environ["FLASH_ATTENTION_TRITON_AMD_ENABLE"] = "TRUE"

    import torch
    import triton
    from triton.runtime import driver

    driver.set_active(_Driver())
    _autotune_nothing(triton)
    torch.cuda.device = lambda *arguments, **settings: contextlib.nullcontext()  # type: ignore[misc, assignment]
    torch.cuda.get_device_capability = lambda device=None: (8, 0)  # type: ignore[assignment]

    from flash_attn import flash_attn_interface

    for name in ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward"):
        operator = getattr(flash_attn_interface, name)
        torch.library.register_kernel(operator, "cpu", operator._init_fn)


def activate_liger() -> None:
    """Make Liger's norms, MLPs and rotations compute on CPU tensors.

    Raises:
        RuntimeError: the packages are not installed.
    """
    _find_packages()

    import numpy as np
    import triton.language as tl
    from liger_kernel.ops import geglu, rms_norm
    from triton.runtime import interpreter

    # The interpreter has none of CUDA's mathematical functions.
    rms_norm.rsqrt = lambda x: tl.math.rsqrt(x)  # not the function itself, which the interpreter replaces while it runs
    geglu.tanh = lambda x: 2 * tl.sigmoid(2 * x) - 1
    stock = interpreter._implicit_cvt

    def as_argument(value: Any) -> Any:
        """A float is a number of Triton's in a kernel, as it is on a GPU; the interpreter leaves it Python's."""
        if isinstance(value, float):
            return tl.tensor(interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32), tl.float32)
        return stock(value)

    interpreter._implicit_cvt = as_argument


def _find_packages() -> None:
    if not PACKAGES.is_dir():
        raise RuntimeError(f"{PACKAGES} does not exist; ./launch/test.sh installs it")
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path.append(str(PACKAGES))


class _Driver:
    """What flash-attn and Triton ask about the device."""

    def get_current_target(self) -> Any:
        return SimpleNamespace(backend="cuda", arch=80, warp_size=32)

    def get_current_device(self) -> int:
        return 0

    def get_device_interface(self) -> Any:
        import torch

        return torch.cpu

    def is_active(self) -> bool:
        return True


def _autotune_nothing(triton: Any) -> None:
    """The first configuration of each kernel: tuning would run them all, and name arguments that do not exist."""
    stock = triton.autotune

    def autotune(configs: list[Any], key: list[str], **settings: Any) -> Any:
        return lambda kernel: stock(configs[:1], [name for name in key if name in kernel.arg_names], **settings)(kernel)

    triton.autotune = autotune
