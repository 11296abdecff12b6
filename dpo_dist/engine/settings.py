"""DeepSpeed's configuration of policy and reference, and how its engines begin and end."""

import io
import logging
from contextlib import redirect_stdout
from typing import Any

import deepspeed
import torch

from dpo_dist.errors import ConfigError

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


def adopt_process_group() -> None:
    """Make DeepSpeed use the process group that exists; it would do so itself later, and print."""
    with redirect_stdout(io.StringIO()):
        deepspeed.init_distributed(verbose=False)


def release_process_group() -> None:
    """Make DeepSpeed forget its process groups, so that a later run of this process can have new ones."""
    if deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()


def engine_config(
    file: dict[str, Any], dtype: torch.dtype, device: torch.device, max_grad_norm: float, key: str = "model.dtype"
) -> dict[str, Any]:
    """DeepSpeed's configuration of the policy: the user's file, and what the run's own configuration decides.

    Raises:
        ConfigError: the dtype cannot be computed with on this device.
    """
    if dtype == torch.float16 and device.type == "cpu":
        raise ConfigError(
            f"{key}=float16 needs a GPU: DeepSpeed has no float16 loss scaling on CPU; use float32 or bfloat16"
        )
    config = dict(file)
    config["train_micro_batch_size_per_gpu"] = 1  # only feeds DeepSpeed's own counters
    config["gradient_accumulation_steps"] = 1  # the boundary is set by hand: micro-batches differ from step to step
    config["gradient_clipping"] = max_grad_norm
    config["steps_per_print"] = None
    for key, its_dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        config.pop(key, None)
        if dtype == its_dtype:
            config[key] = {**file.get(key, {}), "enabled": True}
    return config


def inference_config(policy_config: dict[str, Any]) -> dict[str, Any]:
    """The same for an engine without optimizer: stage 3 as the policy has it, or whole replicas below."""
    zero = dict(policy_config.get("zero_optimization", {}))
    config = {key: value for key, value in policy_config.items() if key not in ("gradient_clipping", "data_types")}
    if zero.get("stage", 0) < 3:
        # DeepSpeed refuses stages 1 and 2 where there is no optimizer to shard.
        return {**config, "zero_optimization": {"stage": 0}}
    zero.pop("offload_optimizer", None)
    return {**config, "zero_optimization": zero}


def initialize(**arguments: Any) -> Any:
    """DeepSpeed's engine."""
    # It prints what memory it finds, on every rank.
    with redirect_stdout(io.StringIO()):
        return deepspeed.initialize(**arguments)[0]
