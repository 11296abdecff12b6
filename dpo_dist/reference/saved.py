"""The weights of a reference that follows the policy, in a checkpoint: each rank's own slices, as safetensors.

reference-rank00000.safetensors ...   one for each rank under ZeRO-3; below, only the first rank's, which is whole
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dpo_dist.engine import InferenceEngine
from dpo_dist.errors import CheckpointError


def save_reference(
    engine: InferenceEngine, folder: Path, copies: bool = False
) -> list[tuple[Path, Callable[[], None] | None]]:
    """Write what this rank holds; every rank calls it, and none waits for another.

    Args:
        engine: of the reference.
        folder: of the checkpoint.
        copies: only copy to host memory; what is returned writes the file.
    Returns:
        This rank's file, if it has one, and what writes it; None: it is written.
    Raises:
        OSError, SafetensorError: what this rank's write raised.
    """
    rank = _rank()
    if rank and not engine.is_partitioned:
        return []
    tensors = {name: share.contiguous() for name, share in engine.named_shares()}
    path, metadata = _path(folder, rank), _metadata(engine)
    if copies:
        kept = {name: share.to("cpu", copy=True) for name, share in tensors.items()}
        return [(path, lambda: save_file(kept, path, metadata=metadata))]
    save_file(tensors, path, metadata=metadata)
    return [(path, None)]


def load_reference(engine: InferenceEngine, folder: Path) -> None:
    """Set the reference's weights to those that `save_reference` wrote; every rank must call it.

    Raises:
        CheckpointError: the files are not there, are damaged, or belong to another model, dtype or number of ranks.
    """
    path = _path(folder, _rank() if engine.is_partitioned else 0)
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing: the checkpoint holds no weights of a reference for this rank; resume with the "
            "reference.sync_ref_model, ZeRO stage and number of processes that it was saved with"
        )
    try:
        with safe_open(path, framework="pt") as file:
            _fill(engine, file, path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); resume from another checkpoint") from error
    engine.shares_have_changed()


@torch.no_grad()
def _fill(engine: InferenceEngine, file: Any, path: Path) -> None:
    """Everything is compared before anything is written: a checkpoint that does not fit changes nothing."""
    found, needed = dict(file.metadata() or {}), _metadata(engine)
    if wrong := [key for key in needed if found.get(key) != needed[key]]:
        key = wrong[0]
        raise CheckpointError(f"{path} does not fit: {_difference(key, found.get(key, ''), needed[key])}")
    shares = dict(engine.named_shares())
    for name, share in shares.items():
        stored = file.get_slice(name)
        if stored.get_shape() != list(share.shape):
            raise CheckpointError(f"{path} does not fit: {name} has {stored.get_shape()} elements, not {len(share)}")
    for name, share in shares.items():
        share.copy_(file.get_tensor(name))


def _metadata(engine: InferenceEngine) -> dict[str, str]:
    """What has to be the same when the file is loaded; safetensors takes texts only."""
    partitioned = engine.is_partitioned
    return {
        "processes": str(torch.distributed.get_world_size()) if partitioned else "any",
        "rank": str(_rank()) if partitioned else "any",
        "dtype": str(engine.dtype).removeprefix("torch."),
        "shapes": json.dumps(engine.whole_shapes(), sort_keys=True),
    }


def _difference(key: str, found: str, needed: str) -> str:
    if key != "shapes":
        return f"{key} is {found or 'not given'} in it, and {needed} here; resume with the settings it was saved with"
    theirs, own = json.loads(found or "{}"), json.loads(needed)
    name = min(name for name in theirs.keys() | own.keys() if theirs.get(name) != own.get(name))
    return f"{name} has shape {theirs.get(name)} in it, and {own.get(name)} here; resume with the reference it is of"


def _path(folder: Path, rank: int) -> Path:
    return folder / f"reference-rank{rank:05d}.safetensors"


def _rank() -> int:
    return torch.distributed.get_rank()
