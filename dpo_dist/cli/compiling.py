"""What `model.torch_compile` needs of the machine and of the run."""

import os
import shutil
from importlib.util import find_spec
from typing import Any

import torch

from dpo_dist.config import RunConfig
from dpo_dist.errors import ConfigError
from dpo_dist.pretrained import is_prompt_learning


def require_compilable(config: RunConfig, deepspeed: dict[str, Any], device: torch.device) -> None:
    """Refuse what torch.compile cannot compile here.

    Args:
        config: the run's.
        deepspeed: the policy's complete DeepSpeed configuration.
        device: where it computes.
    Raises:
        ConfigError: naming what is missing, or what does not go together.
    """
    if not config.model.torch_compile:
        return
    if reason := _unfit(config, deepspeed) or _missing(device):
        raise ConfigError(f"model.torch_compile=true {reason}")


def _unfit(config: RunConfig, deepspeed: dict[str, Any]) -> str:
    adapter = config.adapter
    if not adapter.is_used:
        return ""
    if adapter.load_in_4bit:
        return "does not go with adapter.load_in_4bit=true, whose products torch cannot compile; leave one of them out"
    if is_prompt_learning(adapter):
        return "does not go with virtual tokens (prefix_tuning, prompt_tuning, p_tuning); leave it out, or use lora"
    if deepspeed.get("zero_optimization", {}).get("stage", 0) == 3:
        return (
            "does not go with adapters under ZeRO-3, where DeepSpeed gathers weights within a layer; use a DeepSpeed "
            "file of stage 2 or lower, which shards gradients and optimizer of an adapter as well, or leave it out"
        )
    return ""


def _missing(device: torch.device) -> str:
    if device.type == "cpu":
        compiler = os.environ.get("CXX") or "g++"
        if shutil.which(compiler) is None:
            return f"needs a C++ compiler on a CPU, and {compiler} is not found; install g++, or set CXX"
    elif find_spec("triton") is None:
        return (
            "needs the package triton on a GPU, which torch's builds for CUDA bring along; install it, or leave it out"
        )
    return ""
