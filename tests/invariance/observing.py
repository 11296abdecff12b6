"""What a run does, seen from outside: wrapped around the objects of one run, nothing is added to the package."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from dpo_dist.batch import MicroBatch, RankWork
from dpo_dist.engine import InferenceEngine, TrainingEngine
from dpo_dist.reference import LiveReference
from dpo_dist.trainer import Progress, Run


@dataclass
class Observation:
    """One rank's view of one run; every number was counted while it ran."""

    stage: int = -1
    micro_batches: list[list[int]] = field(default_factory=list)  # tokens of each micro-batch of each step
    completions: list[int] = field(default_factory=list)  # scored by this rank in each step
    reference_bins: list[list[int]] = field(default_factory=list)  # the same for the reference
    backward_calls: int = 0
    attention_forwards: int = 0  # of all decoder layers of the policy, recomputation included
    num_layers: int = 0
    whole_numel: int = 0  # parameters of the model
    policy_numel: int = 0  # of these, held by this rank between steps
    reference_numel: int = 0
    optimizer_numel: int = 0  # first moments held by this rank
    gradients_partitioned: bool = False
    reference_before: str = ""  # hashes over all bits of all parameters
    reference_after: str = ""
    policy_before: str = ""
    policy_after: str = ""

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return asdict(self)


@dataclass(frozen=True)
class ObservedReference:
    """A reference that counts what it is asked."""

    reference: LiveReference
    seen: Observation

    def completion_logps(self, work: RankWork) -> Tensor:
        """Pass on."""
        self.seen.reference_bins.append([batch.num_tokens for batch in work.reference_bins()])
        return self.reference.completion_logps(work)


def observe(run: Run) -> tuple[Run, Observation]:
    """The same run, and what will be seen of it. Collective: every rank must call it, before the first step."""
    seen = Observation()
    assert isinstance(run.reference, LiveReference)
    engine, reference = run.policy.engine, run.reference.engine
    seen.stage = engine.zero_optimization_stage()
    seen.whole_numel = sum(_whole_numel(p) for p in run.policy.model.parameters())
    seen.policy_numel = sum(_held_numel(p) for p in run.policy.model.parameters())
    seen.reference_numel = sum(_held_numel(p) for p in reference.engine.module.parameters())
    seen.reference_before, seen.policy_before = _digest(reference), _digest(run.policy)
    layers: Any = run.policy.model.model.get_decoder().layers
    seen.num_layers = len(layers)
    for layer in layers:
        # Inside of the layer: transformers recomputes a layer's forward, not its call, so hooks of the layer run once.
        layer.self_attn.register_forward_pre_hook(lambda *_: _count_attention(seen))
    _watch_policy(run.policy, seen)
    return replace(run, reference=ObservedReference(run.reference, seen)), seen


def conclude(run: Run, progress: Progress, seen: Observation) -> None:
    """What can be seen after the last step. Collective: every rank must call it."""
    assert progress.step == run.num_steps
    assert isinstance(run.reference, ObservedReference)
    seen.reference_after, seen.policy_after = _digest(run.reference.reference.engine), _digest(run.policy)
    optimizer = run.policy.engine.optimizer
    # DeepSpeed wraps the optimizer at stages 1 to 3; at stage 0 in float32 it is AdamW itself.
    state = getattr(optimizer, "optimizer", optimizer).state
    seen.optimizer_numel = sum(entry["exp_avg"].numel() for entry in state.values() if "exp_avg" in entry)
    seen.gradients_partitioned = bool(run.policy.engine.zero_optimization_partition_gradients())


def _watch_policy(policy: TrainingEngine, seen: Observation) -> None:
    accumulate, backward = policy.accumulate, policy.backward

    def observed_accumulate(batches: Sequence[MicroBatch]) -> Iterator[MicroBatch]:
        seen.micro_batches.append([batch.num_tokens for batch in batches])
        seen.completions.append(sum(len(batch.completion_index_C) for batch in batches))
        return accumulate(batches)

    def observed_backward(loss: Tensor) -> None:
        seen.backward_calls += 1
        backward(loss)

    policy.accumulate, policy.backward = observed_accumulate, observed_backward


def _count_attention(seen: Observation) -> None:
    seen.attention_forwards += 1


def _whole_numel(parameter: nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())


def _held_numel(parameter: nn.Parameter) -> int:
    """Elements this rank holds: the whole parameter, or under ZeRO-3 its shard while nothing is gathered."""
    shard = getattr(parameter, "ds_tensor", None)
    return parameter.numel() + (0 if shard is None else shard.numel())


def _digest(engine: TrainingEngine | InferenceEngine) -> str:
    """Hash over every bit of every parameter; empty on ranks other than the first, who have to take part."""
    digest = hashlib.sha256()
    for name, whole in engine.named_full_parameters():
        if whole is not None:
            digest.update(name.encode() + whole.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest() if torch.distributed.get_rank() == 0 else ""
