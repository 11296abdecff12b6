"""`dpo-dist train` with an observer, which saves nothing: torchrun ... -m benchmarks.gpu_kit.observed CONFIG

The run is the command's own, up to its last step: a checkpoint of a billion parameters takes 14 GB and says nothing
about speed. When the last step is done, each rank writes `observed-<rank>.json` into the run's folder:
peak memory, the bytes of what it holds by category, beside them their closed form, and what the self-check measured.
"""

import json
import math
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpo_dist import trainer
from dpo_dist.attention.interface import _NAMES
from dpo_dist.cli import app, training
from dpo_dist.cli.ending import end_rank
from dpo_dist.reference import LiveReference
from dpo_dist.trainer import Progress, Run, peak_memory_gib

KERNELS = {as_registered: name for name, as_registered in _NAMES.items()}
MASTER_AND_MOMENTS_BYTES = 12  # AdamW on float32 masters: the master and two moments of each element


def main() -> int:
    """Run the command; its exit code."""
    stock_train = training.train

    def train(run: Run, progress: Progress) -> None:
        stock_train(run, progress)
        path = Path(run.config.train.output_dir) / f"observed-{run.ranks.rank}.json"
        path.write_text(json.dumps(_observe(run)), encoding="utf-8")

    training.train = train
    save_nothing()
    # The command returns its exit code where it is not left to typer to end the process.
    return app(args=["train", *sys.argv[1:]], standalone_mode=False) or 0


def save_nothing() -> None:
    """Let a run end without a checkpoint and without a model."""
    trainer.save = lambda run, progress: None
    training._export = lambda prepared, run, progress: None


def _observe(run: Run) -> dict[str, Any]:
    policy, world_size = run.policy, run.ranks.world_size
    assert isinstance(run.reference, LiveReference)
    shapes = [getattr(p, "ds_shape", p.shape) for p in policy.model.parameters()]
    return {
        "kernel": KERNELS[str(policy.model.model.config._attn_implementation)],
        "device": run.ranks.device.type,
        "num_parameters": sum(math.prod(shape) for shape in shapes),
        "peak_flops": run.pace.peak,  # what `mfu` of the run's lines is a share of
        "peak_bytes": round(peak_memory_gib(run.ranks.device) * 2**30),
        "reserved_bytes": torch.cuda.max_memory_reserved() if run.ranks.device.type == "cuda" else None,
        "held_bytes": {
            "policy parameters": _shard_bytes(policy.model.parameters()),
            "reference parameters": _shard_bytes(run.reference.engine.model.parameters()),
            "gradients": _bytes(_gradient_buffers(policy.engine.optimizer)),
            "optimizer": _bytes(_optimizer_tensors(policy.engine.optimizer)),
        },
        "expected_bytes": _expected(shapes, world_size, policy.dtype, run.config.parallel.deepspeed),
        "self_check": None if run.proof is None else asdict(run.proof),
    }


def _expected(shapes: list[Any], world_size: int, dtype: torch.dtype, deepspeed: str) -> dict[str, int]:
    """ZeRO-3's closed form: every parameter is filled up to a multiple of the ranks and cut into equal parts."""
    elements = sum(math.ceil(math.prod(shape) / world_size) for shape in shapes)
    gradient_bytes = 4 if deepspeed.endswith("_bf16") else dtype.itemsize  # such files add gradients up in float32
    return {
        "policy parameters": elements * dtype.itemsize,
        "reference parameters": elements * dtype.itemsize,
        "gradients": elements * gradient_bytes,
        "optimizer": elements * MASTER_AND_MOMENTS_BYTES,
    }


def _shard_bytes(parameters: Iterable[Any]) -> int:
    return _bytes(p.ds_tensor for p in parameters)


def _gradient_buffers(optimizer: Any) -> list[Tensor]:
    buffer = optimizer.grad_partitions_flat_buffer
    return [] if buffer is None else [buffer]


def _optimizer_tensors(optimizer: Any) -> list[Tensor]:
    moments = [t for state in optimizer.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    return [*optimizer.fp32_partitioned_groups_flat, *(t for t in moments if t.dim() > 0)]


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of the storages, each counted once: DeepSpeed keeps many views of few buffers."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


if __name__ == "__main__":
    end_rank(main())
