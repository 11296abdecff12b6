"""The policy: forward with or without gradient, backward, update."""

import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from jaxtyping import Float
from torch import Tensor

from dpo_dist.batch import MicroBatch
from dpo_dist.config import TrainConfig
from dpo_dist.distributed import Ranks
from dpo_dist.engine import shares, traces
from dpo_dist.engine.adamw import CPUAdamW
from dpo_dist.engine.operators import load_operator
from dpo_dist.engine.rank_allocation import RankAllocation
from dpo_dist.engine.settings import initialize
from dpo_dist.engine.whole import named_full_parameters
from dpo_dist.errors import ConfigError
from dpo_dist.logprobs import LogProbHead, TokenScores
from dpo_dist.model import ScoringModel
from dpo_dist.optim import parameter_groups
from dpo_dist.phases import reach

logger = logging.getLogger(__name__)


class TrainingEngine:
    """The policy: forward with or without gradient, backward, update, shards on disk."""

    def __init__(self, model: ScoringModel, config: dict[str, Any], train: TrainConfig, ranks: Ranks) -> None:
        zero = config.get("zero_optimization", {})
        offloaded = zero.get("offload_optimizer", {}).get("device", "none") != "none"
        named = ((name, p, len(getattr(p, "ds_shape", p.shape))) for name, p in model.named_parameters())
        groups = parameter_groups(named, train.weight_decay)
        optimizer = _adamw(groups, train, on_gpu=ranks.device.type == "cuda", offloaded=offloaded)
        if ranks.device.type == "cpu":
            # Compiling DeepSpeed's CPU Adam takes a minute and gains nothing where everything is on the CPU.
            config = {**config, "zero_force_ds_cpu_optimizer": False}
        self.ranks = ranks
        self._optimizer, self._states_elsewhere = optimizer, offloaded and ranks.device.type != "cpu"
        self.model = model.train()  # recomputation of activations acts in training mode only; dropout is 0
        self.engine = initialize(model=model, optimizer=optimizer, config=config)
        self.device = torch.device(self.engine.device)
        self.max_grad_norm, self._has_trained = train.max_grad_norm, False
        self.allocation: RankAllocation | None = None
        if model.adapter is not None and model.adapter.kind == "adalora":
            if "fp16" in config:
                raise ConfigError(
                    "adapter.peft_type=adalora does not go with model.dtype=float16, whose gradients are scaled; use "
                    "bfloat16 or float32"
                )
            self.allocation = RankAllocation(model.adapter, model.model, self.engine.optimizer)
        replicated, halved = zero.get("stage", 0) == 0, bool({"bf16", "fp16"} & config.keys())
        self._computes_own_norm, self._is_refused = replicated and not halved, False
        if self._computes_own_norm:
            # DeepSpeed refuses an update that is not finite at all other stages and dtypes.
            self.engine.optimizer.register_step_pre_hook(self._before_update)
            # Of one process there is nothing to sum, for which DeepSpeed would copy all gradients and copy them back.
            self.engine.enable_backward_allreduce = ranks.world_size > 1
        if replicated and halved:
            # DeepSpeed 0.19.8 makes AdamW's state by an update with zero gradients, which then counts in the bias
            # correction: the first real update would be a quarter too small. AdamW makes its state itself.
            self.engine.optimizer.optimizer.state.clear()

    def compile_statistics(self, names: tuple[str, ...]) -> None:
        """Have what `token_scores` computes of these compiled before the first step, if it is to be."""
        head = next(module for module in self.model.modules() if isinstance(module, LogProbHead))
        head.compile_statistics(names, self.dtype, self.device)

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return next(self.model.parameters()).dtype

    def token_logps(self, batch: MicroBatch) -> Float[Tensor, " M"]:
        """log pi(token | prefix) of every scored token, nats. Every rank must call it: ZeRO-3 gathers."""
        reach("forward")
        return self.engine(batch.to(self.device))

    def token_scores(self, batch: MicroBatch, statistics: tuple[str, ...]) -> TokenScores:
        """The same, and `logprobs.STATISTICS` of those names at every scored token, which have no gradient.

        The log-probabilities and their gradient are the same bits whatever is asked for. Every rank must call it:
        ZeRO-3 gathers.
        """
        if not statistics:
            logps_M = self.token_logps(batch)
            return TokenScores(logps_M, logps_M.new_empty(0, len(logps_M)))
        reach("forward")
        logps_M, statistics_KM = self.engine(batch.to(self.device), statistics)
        return TokenScores(logps_M, statistics_KM, statistics)

    @torch.no_grad()
    def reference_token_logps(self, batch: MicroBatch) -> Float[Tensor, " M"]:
        """The same of the reference that an adapted model holds (`ScoringModel.as_reference`), without gradient.

        Without an adapter: the policy's own. Every rank must call it: ZeRO-3 gathers.
        """
        reach("reference")
        with self.model.as_reference():
            return self.engine(batch.to(self.device))

    def completion_logps(self, batch: MicroBatch) -> Float[Tensor, " C"]:
        """log pi(completion | prompt) of every completion of the micro-batch, nats."""
        return batch.to(self.device).completion_sums(self.token_logps(batch))

    def accumulate(self, batches: Sequence[MicroBatch]) -> Iterator[MicroBatch]:
        """The micro-batches of one step; DeepSpeed is told before the last one that gradients are complete after it."""
        if not self._has_trained:
            traces.forget_forward_only(self.engine)  # of self-check and evaluation
            self._has_trained = True
        for index, batch in enumerate(batches):
            self.engine.set_gradient_accumulation_boundary(index == len(batches) - 1)
            yield batch.to(self.device)

    def backward(self, loss: Float[Tensor, ""]) -> None:
        """Add the gradient of this rank's part of the objective. Every rank must call it equally often."""
        # 1, or NaN: an infinite loss may have a finite gradient, with which the update would be made.
        soundness = loss.detach() * (torch.nan if reach("backward") else 0.0) + 1.0
        # DeepSpeed averages over ranks; the objective is a sum over ranks.
        self.engine.backward(loss * soundness * self.ranks.world_size, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> Float[Tensor, "1"]:
        """Clip, update, and forget the gradients. An update that is not finite is not made, on any rank.

        Returns:
            The gradient's norm before clipping, float64, on the first rank; 0 on the others, so that the sum over ranks
            is the norm. It stays on the device: reading it would make the host wait, as it does at stage 0 in float32
            and for AdaLoRA, where it decides what happens next. 0 as well where float16
            overflowed: DeepSpeed has then lowered its loss scale and left the weights alone, which is how it finds the
            right one. In other dtypes an overflow is reported.
        """
        reach("update")
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        if self.allocation is not None:
            self.allocation.before_update()
        own_norm = self._full_precision_norm() if self._computes_own_norm else None
        self._is_refused = own_norm is not None and not math.isfinite(float(own_norm))
        self.engine.step()
        if self.dtype == torch.float16 and not self.engine.was_step_applied():
            logger.warning("float16 overflowed: this update is skipped, and the loss scale lowered")
            return torch.zeros(1, dtype=torch.float64, device=self.device)
        norm = self.engine.get_global_grad_norm() if own_norm is None else own_norm
        known = torch.as_tensor(norm, dtype=torch.float64, device=self.device).reshape(1)
        if self.allocation is not None and math.isfinite(float(known)):
            # DeepSpeed's count of updates is part of its checkpoints.
            clipping = min(1.0, self.max_grad_norm / (float(known) + 1e-6))
            self.allocation.after_update(self.engine.global_steps, clipping)
        return known if self.ranks.is_first else torch.zeros_like(known)

    def _before_update(self, *_: Any) -> None:
        if self._is_refused:
            self.engine.zero_grad()  # what has no gradient is left alone

    def _full_precision_norm(self) -> Tensor:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    @torch.no_grad()
    def own_token_logps(self, batch: MicroBatch) -> Float[Tensor, " M"]:
        """The same of one short completion by the architecture's own forward, without gradient (`model.own_logps`).

        Every rank must call it: ZeRO-3 gathers.
        """
        return self.engine(batch.to(self.device), by_itself=True)

    def named_shares(self) -> Iterator[tuple[str, Tensor]]:
        """What this rank keeps of every parameter, flat, as the model computes with it; to read only."""
        return shares.named_shares(self.model.model)

    @property
    def is_on_disk(self) -> bool:
        """Whether shares are kept on NVMe, out of reach."""
        return shares.is_on_disk(self.model)

    def whole_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter."""
        return shares.whole_shapes(self.model.model)

    def broken_parameter(self) -> str:
        """The name of a trained parameter of which this rank keeps a value that is not finite; empty if there is none.

        Shares on NVMe are not looked at.
        """
        if self.is_on_disk:
            return ""
        trained = ((name, shares.own_share(p)) for name, p in self.model.named_parameters() if p.requires_grad)
        return next((name for name, share in trained if not bool(torch.isfinite(share).all())), "")

    @property
    def has_all_states(self) -> bool:
        """Whether AdamW's moments will take no more of the device: they are there, or are kept elsewhere.

        DeepSpeed makes some when it begins, torch with the first update.
        """
        return self._states_elsewhere or bool(self._optimizer.state)

    @property
    def num_trained(self) -> int:
        """How many parameters have a gradient, over all ranks."""
        return shares.num_trained(self.model)

    def named_full_parameters(self) -> Iterator[tuple[str, Tensor | None]]:
        """Every parameter and persistent buffer whole, one at a time, on the first rank's CPU (None elsewhere).

        Every rank must iterate: ZeRO-3 gathers.
        """
        return named_full_parameters(self.model.model)

    def named_adapter_parameters(self) -> Iterator[tuple[str, Tensor | None]]:
        """What is trained of an adapted model, whole, one at a time, as above. Every rank must iterate."""
        named = named_full_parameters(self.model, lambda parameter: parameter.requires_grad)
        return ((name.removeprefix("model."), whole) for name, whole in named)


def _adamw(groups: list[dict[str, Any]], train: TrainConfig, on_gpu: bool, offloaded: bool) -> torch.optim.Optimizer:
    betas = (train.adam_beta1, train.adam_beta2)
    # A rate of 0 until `step` sets the step's own: nothing decays in an update that DeepSpeed makes on its own.
    if offloaded and on_gpu:
        load_operator("CPUAdamBuilder")
        return DeepSpeedCPUAdam(groups, lr=0.0, betas=betas, eps=train.adam_epsilon, adamw_mode=True)
    if on_gpu:  # one pass over the states, where torch would make several
        return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=train.adam_epsilon, fused=True)
    return CPUAdamW(groups, lr=0.0, betas=betas, eps=train.adam_epsilon)
