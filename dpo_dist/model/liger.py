"""Liger's fused kernels in a loaded model: RMSNorm, SwiGLU (of Gemma GeGLU), RoPE.

Facts from liger-kernel 0.8.5. A norm or MLP gets its new forward as an attribute of the instance: hooks of ZeRO-3 run
around it, and it calls the linear layers by their names, where PEFT puts its own. What it replaces besides, in the
architecture's module, would act on every model of the process: classes are put back at once, and the rotation, which
layers look up there, as soon as a model is to be computed without Liger.
"""

import importlib
import importlib.util
import inspect
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from dpo_dist.errors import ConfigError
from dpo_dist.pretrained.folder import first_line

# The check at the start compares a beginning of one example, on the first micro-batch of each rank. Each of these is
# compared with its stock forward by tests/gpu_contract/test_liger.py.
LIGER_CHECKED = frozenset(
    {
        *("exaone4", "gemma", "gemma2", "gemma3_text", "glm4", "gpt_oss", "granite", "llama"),
        *("ministral", "mistral", "olmo2", "olmo3", "phi3", "qwen2", "qwen3", "smollm3"),
    }
)
_KEY = "model.use_liger_kernel=true"
_WAY_OUT = "leave it out: the result is the same within rounding"
# Liger's default replaces the forward of the whole model, of Granite torch's cross entropy for everybody.
_OUR_HEAD = {"cross_entropy": False, "fused_linear_cross_entropy": False}
# What its MLPs compute, whatever the configuration says.
_ACTIVATIONS = {"swiglu": ("silu", "swish"), "geglu": ("gelu_pytorch_tanh",)}
_REPLACED: dict[tuple[Any, str], Any] = {}  # by module and name: the stock function


def require_liger(device: torch.device, *configs: PretrainedConfig) -> None:
    """Find out whether Liger's kernels can be used.

    Args:
        device: what the run is on.
        configs: of every model of the run.
    Raises:
        ConfigError: there is no GPU, no package, or an architecture that it does not compute rightly.
    """
    if device.type != "cuda":
        raise ConfigError(f"{_KEY} needs a GPU with Triton, and this run is on {device.type}; {_WAY_OUT}")
    if importlib.util.find_spec("liger_kernel") is None:
        raise ConfigError(
            f"{_KEY} needs the package liger-kernel; install it by pip install 'dpo-dist[liger]', or {_WAY_OUT}"
        )
    try:
        known = importlib.import_module("liger_kernel.transformers.monkey_patch").MODEL_TYPE_TO_APPLY_LIGER_FN
    except Exception as error:  # it imports Triton, and every model class that it knows
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ConfigError(
            f"{_KEY}: liger-kernel is installed and cannot be imported ({reason}); install the version of "
            f"constraints.txt, or {_WAY_OUT}"
        ) from error
    for config in configs:
        if obstacle := _obstacle(config, known):
            raise ConfigError(f"{_KEY}: {obstacle}; {_WAY_OUT}")


def _obstacle(config: PretrainedConfig, known: Mapping[str, Any]) -> str | None:
    """Why Liger cannot compute a model, if so."""
    name = config.model_type
    if name not in known:
        return f"liger-kernel has no kernels for architecture {name}"
    if name not in LIGER_CHECKED:
        return f"liger-kernel's kernels were never compared with the own forward of architecture {name}"
    if hasattr(config, "auto_map"):
        return f"liger-kernel does not know the code that comes with this model of architecture {name}"
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    for kernel in inspect.signature(known[name]).parameters.keys() & _ACTIVATIONS.keys():
        if activation not in _ACTIVATIONS[kernel]:
            expected = " or ".join(_ACTIVATIONS[kernel])
            return f"liger-kernel computes {expected} in architecture {name}, and this model has {activation}"
    return None


def use_liger(model: PreTrainedModel) -> None:
    """Let norms, MLPs and rotations of a loaded model be computed by Liger's kernels; the head stays ours.

    Args:
        model: as it was loaded, of an architecture that `require_liger` let pass.
    """
    # For rotations Liger would take another backend where one is installed (flash-attn 4 brings CuTe along): another
    # kernel than the one that was compared. It also warns on every rank of those that cannot be imported.
    logging.getLogger("liger_kernel.backends.registry").setLevel(logging.ERROR)
    importlib.import_module("liger_kernel.backends").set_impl("nvidia-triton")
    module = sys.modules[type(model).__module__]
    before = dict(vars(module))
    # Its module imports PEFT, which a run without adapters does not pay for.
    importlib.import_module("transformers.integrations.liger").apply_liger_kernel(model, dict(_OUR_HEAD))
    for name, stock in before.items():
        if getattr(module, name) is stock:
            continue
        if isinstance(stock, type):  # the next model's layers would lack biases that the configuration asks for
            setattr(module, name, stock)
        else:
            _REPLACED.setdefault((module, name), stock)


@contextmanager
def stock_modules(model: nn.Module) -> Iterator[None]:
    """Inside, a model computes everything itself, also where it was given to `use_liger`.

    Args:
        model: any.
    """
    replaced = [module for module in model.modules() if uses_liger(module)]
    forwards = [module.__dict__.pop("forward") for module in replaced]
    functions = {place: getattr(*place) for place in _REPLACED}
    _put_back()
    try:
        yield
    finally:
        for module, forward in zip(replaced, forwards, strict=True):
            module.__dict__["forward"] = forward
        for (module, name), function in functions.items():
            setattr(module, name, function)


def uses_liger(module: nn.Module) -> bool:
    """Whether a norm or an MLP is computed by one of its kernels."""
    function = getattr(module.__dict__.get("forward"), "__func__", None)
    return getattr(function, "__module__", "").startswith("liger_kernel.")


def without_liger() -> None:
    """From here on models that are built compute everything themselves, rotations too."""
    _put_back()
    _REPLACED.clear()


def _put_back() -> None:
    for (module, name), stock in _REPLACED.items():
        setattr(module, name, stock)
