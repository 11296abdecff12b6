"""What a backward pass has to be left in memory by its forward pass: measured, and how much of it there is room for."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dpo_dist.batch import MicroBatch
from dpo_dist.engine.training import TrainingEngine
from dpo_dist.model import ScoringModel

# Of the memory that is free, what is planned with: allocators lose some between their blocks, and kernels take some.
_PLANNED_SHARE = 0.85
# Bytes for each logit of a chunk in the head's backward: the logits, their gradient, and one more of either on the way.
_LOGIT_COPIES = 3


@dataclass(frozen=True)
class ActivationMemory:
    """Bytes that a policy's forward and backward pass takes on one device.

    Attributes:
        kept: for each token, what one layer keeps for its backward.
        recomputed: for each token, what is left of a layer that computes its activations again: its input.
        outside: for each token, what is kept before the first and after the last layer.
        num_layers: of which each can be told to recompute.
        fixed: what does not depend on the tokens: gradients and optimizer states that are not there yet, a chunk of
            logits, gathered weights.
    """

    kept: float
    recomputed: float
    outside: float
    num_layers: int
    fixed: float

    def needed(self, tokens: int, count: int) -> float:
        """Bytes of a micro-batch of `tokens` where `count` layers recompute; one of them at a time is there whole."""
        layers = (self.num_layers - count) * self.kept + count * self.recomputed
        return self.fixed + tokens * (self.outside + layers + self.kept)

    def fewest(self, tokens: int, free: int) -> int | None:
        """The least number of layers that have to recompute so that it fits; None: not even all of them are enough."""
        room = _PLANNED_SHARE * free
        return next((count for count in range(self.num_layers + 1) if self.needed(tokens, count) <= room), None)

    def most_tokens(self, free: int, count: int) -> int:
        """The largest micro-batch that fits with `count` recomputing layers; 0 if none does."""
        each = self.needed(1, count) - self.fixed
        return max(0, math.floor((_PLANNED_SHARE * free - self.fixed) / each))


def measure_activations(policy: TrainingEngine, batch: MicroBatch) -> ActivationMemory:
    """Run a small micro-batch forward, none of whose layers recompute, and see what it keeps. Collective.

    Args:
        policy: before its first update.
        batch: the same on every rank, of at least one token.
    """
    # Hooks within a layer would be compiled with it.
    with policy.model.as_written(), _saved_by(policy.model) as (inside, outside):
        logps_M = policy.token_logps(batch)
    del logps_M
    tokens, num_layers = len(batch.input_ids_T), len(policy.model.switchable_layers)
    text: Any = policy.model.model.config.get_text_config()
    recomputed = float(text.hidden_size * policy.dtype.itemsize)
    kept = max(recomputed, sum(inside.values()) / tokens / num_layers)
    outside_each = sum(outside.values()) / tokens
    return ActivationMemory(kept, recomputed, outside_each, num_layers, _fixed_bytes(policy, text))


def _fixed_bytes(policy: TrainingEngine, text: Any) -> float:
    head: Any = policy.model.model.get_output_embeddings()
    logits = float(_LOGIT_COPIES * head.chunk_tokens * text.vocab_size * 4 + text.vocab_size * text.hidden_size * 4)
    return logits + _bytes_to_come(policy)


def _bytes_to_come(policy: TrainingEngine) -> float:
    """Gradients, optimizer states and buffers that DeepSpeed takes in the first step and not before."""
    engine, numel, itemsize = policy.engine, float(policy.num_trained), policy.dtype.itemsize
    stage = engine.zero_optimization_stage()
    share = numel / (policy.ranks.world_size if stage >= 2 else 1)
    come = 0.0 if hasattr(engine.optimizer, "grad_partitions_flat_buffer") else 4.0 * share
    if not policy.has_all_states:
        come += 8.0 * numel / (policy.ranks.world_size if stage >= 1 else 1)
    if stage >= 1:
        come += min(numel, float(engine.zero_reduce_bucket_size())) * itemsize * 2  # one is sent while one is filled
    if stage >= 3:
        total = float(sum(math.prod(shape) for shape in policy.whole_shapes().values()))
        come += min(total, float(engine.zero_max_live_parameters()) + engine.zero_prefetch_bucket_size()) * itemsize
    return come


@contextmanager
def _saved_by(model: ScoringModel) -> Iterator[tuple[dict[int, int], dict[int, int]]]:
    """Notes the bytes of every storage that is kept for backward and holds no parameter, by its address.

    Those of the layers, and those of all else.
    """
    weights: set[int] = set()  # storages of the weights of modules that are computing: ZeRO-3 has gathered them
    layers = set(model.switchable_layers)
    computing: list[nn.Module] = []
    keepers: dict[int, nn.Module] = {}  # the layer that was the first to keep a storage
    inside: dict[int, int] = {}
    outside: dict[int, int] = {}

    def enter(module: nn.Module, _: Any) -> None:
        weights.update(p.data.untyped_storage().data_ptr() for p in module.parameters(recurse=False))
        if module in layers:
            computing.append(module)

    def leave(module: nn.Module, *_: Any) -> None:
        weights.difference_update(p.data.untyped_storage().data_ptr() for p in module.parameters(recurse=False))
        if module in layers:
            computing.pop()

    def note(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        address, layer = storage.data_ptr(), computing[-1] if computing else None
        if address not in weights and address not in outside:
            if layer is None or keepers.setdefault(address, layer) is not layer:  # of several layers, as positions are
                inside.pop(address, None)
                outside[address] = storage.nbytes()
            else:
                inside[address] = storage.nbytes()
        return saved

    handles = [module.register_forward_pre_hook(enter) for module in model.modules()]
    handles += [module.register_forward_hook(leave, prepend=True) for module in model.modules()]
    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda kept: kept):
            yield inside, outside
    finally:
        for handle in handles:
            handle.remove()
