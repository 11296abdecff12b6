"""DeepSpeed's configuration of policy and reference, and how its engines begin and end."""

import io
import logging
from contextlib import redirect_stdout
from typing import Any

import deepspeed
import torch
from deepspeed.utils import set_z3_leaf_modules
from torch import nn

from dpo_dist.distributed import Ranks
from dpo_dist.engine.gloo import gather_in_place
from dpo_dist.engine.operators import load_operator
from dpo_dist.engine.whole import find_masters
from dpo_dist.errors import ConfigError
from dpo_dist.model import compiled_classes

_LOGGER = logging.getLogger("DeepSpeed")
_LOGGER.setLevel(logging.WARNING)
# An update that it does not make is reported by us, with the examples of the step.
_LOGGER.addFilter(lambda record: "OVERFLOW!" not in record.getMessage())


def adopt_process_group() -> None:
    """Make DeepSpeed use the process group that exists; it would do so itself later, and print."""
    load_operator("ShareMemCommBuilder")
    with redirect_stdout(io.StringIO()):
        deepspeed.init_distributed(verbose=False)
    gather_in_place()


def release_process_group() -> None:
    """Make DeepSpeed forget its process groups, so that a later run of this process can have new ones."""
    if deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()


def engine_config(
    file: dict[str, Any], dtype: torch.dtype, device: torch.device, max_grad_norm: float
) -> dict[str, Any]:
    """DeepSpeed's configuration of the policy: the user's file, and what the run's own configuration decides.

    Raises:
        ConfigError: the dtype cannot be computed with on this device.
    """
    if dtype == torch.float16 and device.type == "cpu":
        raise ConfigError(
            "model.dtype=float16 needs a GPU: DeepSpeed has no float16 loss scaling on CPU; use float32 or bfloat16"
        )
    config = dict(file)
    config["train_micro_batch_size_per_gpu"] = 1  # only feeds DeepSpeed's own counters
    config["gradient_accumulation_steps"] = 1  # the boundary is set by hand: micro-batches differ from step to step
    config["gradient_clipping"] = max_grad_norm
    config["steps_per_print"] = None
    _set_dtype(config, dtype, file)
    return config


def inference_config(
    policy_config: dict[str, Any],
    dtype: torch.dtype | None = None,
    sharded: bool = True,
    offload_param: bool = False,
    hpz_partition_size: int | None = None,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """The same for an engine without optimizer: stage 3 as the policy has it, or whole replicas.

    Args:
        policy_config: what `engine_config` gave.
        dtype: `reference.dtype`; None: the policy's.
        sharded: `reference.sharded`; below stage 3 every rank has a whole replica anyway.
        offload_param: `reference.offload_param`. A policy that keeps its shards in host memory by the DeepSpeed file
            has a reference that does so as well.
        hpz_partition_size: `reference.zero_hpz_partition_size`; below stage 3 nothing is gathered between nodes anyway.
        ranks: needed for the last two.

    Raises:
        ConfigError: an option has no effect at this ZeRO stage, or does not fit the ranks.
    """
    zero = dict(policy_config.get("zero_optimization", {}))
    config = {key: value for key, value in policy_config.items() if key not in ("gradient_clipping", "data_types")}
    if dtype is not None:
        _set_dtype(config, dtype, policy_config)
        if ranks is not None and dtype == torch.float16 and ranks.device.type == "cpu":
            raise ConfigError("reference.dtype=float16 needs a GPU; use float32 or bfloat16")
    if zero.get("stage", 0) < 3 or not sharded:
        if offload_param:
            raise ConfigError(
                "reference.offload_param=true has no effect below ZeRO stage 3, where every process holds the whole "
                "reference on its device; use a DeepSpeed file of stage 3, or leave it out"
            )
        # DeepSpeed refuses stages 1 and 2 where there is no optimizer to shard.
        return {**config, "zero_optimization": {"stage": 0}}
    zero.pop("offload_optimizer", None)
    if offload_param:
        # Host memory that is not pinned is copied to a GPU half as fast, and never beside the computation.
        zero["offload_param"] = {"device": "cpu", "pin_memory": ranks is not None and ranks.device.type == "cuda"}
    if hpz_partition_size is not None:
        _require_groups(hpz_partition_size, 1 if ranks is None else ranks.world_size)
        zero["zero_hpz_partition_size"] = hpz_partition_size
    return {**config, "zero_optimization": zero}


def _require_groups(size: int, world_size: int) -> None:
    key = f"reference.zero_hpz_partition_size={size}"
    if world_size % size:
        raise ConfigError(
            f"{key} does not divide the {world_size} processes of this run into groups; write the number of processes "
            "of a node, or leave it out"
        )
    if world_size == size:
        raise ConfigError(
            f"{key} makes all processes of this run one group, which would hold every shard twice and gather as "
            "before; leave it out"
        )


def _set_dtype(config: dict[str, Any], dtype: torch.dtype, file: dict[str, Any]) -> None:
    """Give the section of a dtype, and no other; float32 has none."""
    for key, its_dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        config.pop(key, None)
        if dtype == its_dtype:
            config[key] = {**file.get(key, {}), "enabled": True}


def initialize(model: nn.Module, config: dict[str, Any], **arguments: Any) -> Any:
    """DeepSpeed's engine."""
    zero = config.get("zero_optimization", {})
    if "leaf_module" in zero and len({parameter.requires_grad for parameter in model.parameters()}) > 1:
        # DeepSpeed 0.19.8 takes the gradients of such a module when that of its input is there. The first layer's has
        # none where the embedding is frozen, as with adapters, and weights are let go before they are used.
        config = {**config, "zero_optimization": {k: v for k, v in zero.items() if k != "leaf_module"}}
    if zero.get("stage", 0) == 3 and (classes := compiled_classes(model)):
        # Else its hooks, which gather weights, run within a layer, and what is compiled ends at each.
        set_z3_leaf_modules(model, list(classes))
    # It prints what memory it finds, on every rank.
    with redirect_stdout(io.StringIO()):
        engine = deepspeed.initialize(model=model, config=config, **arguments)[0]
    find_masters(engine.optimizer)
    return engine
