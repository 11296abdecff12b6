"""backward, step, gather: the file that knows DeepSpeed.

DeepSpeed runs at every stage from 0 to 3, also for one process and on CPU: one code path. It averages gradients over
ranks; here that is undone, and nobody else knows. Contract: the backward calls of all ranks between two step calls add
up to the gradient of the objective.
"""

import io
import logging
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from typing import Any

import deepspeed
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from jaxtyping import Float
from torch import Tensor, nn

from dpo_dist.batch import MicroBatch
from dpo_dist.config import TrainConfig
from dpo_dist.distributed import Ranks
from dpo_dist.errors import ConfigError
from dpo_dist.model import ScoringModel
from dpo_dist.optim import parameter_groups

logger = logging.getLogger(__name__)
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


class InferenceEngine:
    """A model that is only asked for log-probabilities: no optimizer, no gradient, no graph."""

    def __init__(self, model: ScoringModel, config: dict[str, Any]) -> None:
        self.model = model.requires_grad_(False).eval()
        self.engine = _initialize(model=model, config=config)
        self.device = torch.device(self.engine.device)

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return next(self.model.parameters()).dtype

    @torch.no_grad()
    def token_logps(self, batch: MicroBatch) -> Float[Tensor, " M"]:
        """log pi(token | prefix) of every scored token, nats. Every rank must call it: ZeRO-3 gathers."""
        return self.engine(batch.to(self.device))

    def named_full_parameters(self) -> Iterator[tuple[str, Tensor | None]]:
        """Every parameter and persistent buffer whole, one at a time, on the first rank's CPU (None elsewhere).

        Every rank must iterate: ZeRO-3 gathers.
        """
        return _named_full_parameters(self.model.model)


class TrainingEngine:
    """The policy: forward with or without gradient, backward, update, shards on disk."""

    def __init__(self, model: ScoringModel, config: dict[str, Any], train: TrainConfig, ranks: Ranks) -> None:
        zero = config.get("zero_optimization", {})
        offloaded = zero.get("offload_optimizer", {}).get("device", "none") != "none"
        named = ((name, p, len(getattr(p, "ds_shape", p.shape))) for name, p in model.named_parameters())
        groups = parameter_groups(named, train.weight_decay)
        optimizer = _adamw(groups, train, use_deepspeed=offloaded and ranks.device.type == "cuda")
        if ranks.device.type == "cpu":
            # Compiling DeepSpeed's CPU Adam takes a minute and gains nothing where everything is on the CPU.
            config = {**config, "zero_force_ds_cpu_optimizer": False}
        self.ranks = ranks
        self.model = model.train()  # recomputation of activations acts in training mode only; dropout is 0
        self.engine = _initialize(model=model, optimizer=optimizer, config=config)
        self.device = torch.device(self.engine.device)
        replicated, halved = zero.get("stage", 0) == 0, bool({"bf16", "fp16"} & config.keys())
        self._computes_own_norm = replicated and not halved
        if replicated and halved:
            # DeepSpeed 0.19.8 makes AdamW's state by an update with zero gradients, which then counts in the bias
            # correction: the first real update would be a quarter too small. AdamW makes its state itself.
            self.engine.optimizer.optimizer.state.clear()

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return next(self.model.parameters()).dtype

    def token_logps(self, batch: MicroBatch) -> Float[Tensor, " M"]:
        """log pi(token | prefix) of every scored token, nats. Every rank must call it: ZeRO-3 gathers."""
        return self.engine(batch.to(self.device))

    def completion_logps(self, batch: MicroBatch) -> Float[Tensor, " C"]:
        """log pi(completion | prompt) of every completion of the micro-batch, nats."""
        return batch.to(self.device).completion_sums(self.token_logps(batch))

    def accumulate(self, batches: Sequence[MicroBatch]) -> Iterator[MicroBatch]:
        """The micro-batches of one step; DeepSpeed is told before the last one that gradients are complete after it."""
        for index, batch in enumerate(batches):
            self.engine.set_gradient_accumulation_boundary(index == len(batches) - 1)
            yield batch.to(self.device)

    def backward(self, loss: Float[Tensor, ""]) -> None:
        """Add the gradient of this rank's part of the objective. Every rank must call it equally often."""
        # DeepSpeed averages over ranks; the objective is a sum over ranks.
        self.engine.backward(loss * self.ranks.world_size, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> Float[Tensor, "1"]:
        """Clip, update, and forget the gradients.

        Returns:
            The gradient's norm before clipping, float64, on the first rank; 0 on the others, so that the sum over ranks
            is the norm. It stays on the device: reading it would make the host wait. 0 as well where float16
            overflowed: DeepSpeed has then lowered its loss scale and left the weights alone, which is how it finds the
            right one. In other dtypes an overflow is reported.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        own_norm = self._full_precision_norm() if self._computes_own_norm else None
        self.engine.step()
        if self.dtype == torch.float16 and not self.engine.was_step_applied():
            logger.warning("float16 overflowed: this update is skipped, and the loss scale lowered")
            return torch.zeros(1, dtype=torch.float64, device=self.device)
        norm = self.engine.get_global_grad_norm() if own_norm is None else own_norm
        known = torch.as_tensor(norm, dtype=torch.float64, device=self.device).reshape(1)
        return known if self.ranks.is_first else torch.zeros_like(known)

    def _full_precision_norm(self) -> Tensor:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def named_full_parameters(self) -> Iterator[tuple[str, Tensor | None]]:
        """Every parameter and persistent buffer whole, one at a time, on the first rank's CPU (None elsewhere).

        Every rank must iterate: ZeRO-3 gathers.
        """
        return _named_full_parameters(self.model.model)


def _initialize(**arguments: Any) -> Any:
    # It prints what memory it finds, on every rank.
    with redirect_stdout(io.StringIO()):
        return deepspeed.initialize(**arguments)[0]


def _adamw(groups: list[dict[str, Any]], train: TrainConfig, use_deepspeed: bool) -> torch.optim.Optimizer:
    betas = (train.adam_beta1, train.adam_beta2)
    # A rate of 0 until `step` sets the step's own: nothing decays in an update that DeepSpeed makes on its own.
    if use_deepspeed:
        return DeepSpeedCPUAdam(groups, lr=0.0, betas=betas, eps=train.adam_epsilon, adamw_mode=True)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=train.adam_epsilon)


def _named_full_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    for name, parameter in model.named_parameters():
        if not hasattr(parameter, "ds_id"):
            yield name, parameter.detach().cpu() if torch.distributed.get_rank() == 0 else None
            continue
        with deepspeed.zero.GatheredParameters([parameter]):
            whole = parameter.detach().cpu().clone() if torch.distributed.get_rank() == 0 else None
        yield name, whole
    persistent = model.state_dict().keys()
    yield from ((name, buffer.cpu()) for name, buffer in model.named_buffers() if name in persistent)
