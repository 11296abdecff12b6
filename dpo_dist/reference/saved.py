"""The weights of a reference that follows the policy, in a checkpoint: each rank's own slices, as safetensors.

reference-rank00000.safetensors ...   one for each rank under ZeRO-3; below, only the first rank's, which is whole
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dpo_dist.distributed import raising_together
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
    """Set the reference's weights to those that `save_reference` wrote, on however many ranks; every rank must call it.

    Raises:
        CheckpointError: the files are not there, are damaged, or belong to another model or dtype.
    """
    with raising_together():
        try:
            _fill(engine, _Files(folder, engine))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{folder}: the reference's weights cannot be read ({error}); resume from another checkpoint"
            ) from error
    engine.shares_have_changed()


class _Files:
    """What every rank has saved, opened when it is needed.

    Raises:
        CheckpointError: the files are of something else.
    """

    def __init__(self, folder: Path, engine: InferenceEngine) -> None:
        self.folder = folder
        self._opened: dict[int, Any] = {}
        needed, found = _metadata(engine), dict(self._file(0).metadata() or {})
        for key in ("dtype", "shapes"):
            if found.get(key) != needed[key]:
                raise CheckpointError(
                    f"{_path(folder, 0)} does not fit: {_difference(key, found.get(key, ''), needed[key])}"
                )
        # Each of so many ranks has one of equal parts, but for what the last ones lack.
        self.processes = int(found["processes"]) if found.get("processes", "").isdigit() else 1

    def find(self, name: str, numel: int, begin: int, length: int) -> list[tuple[Any, slice]]:
        """Where elements `begin` to `begin + length` of a parameter of `numel` are, flat; nothing is read."""
        size = -(-numel // self.processes)
        pieces = []
        for rank in range(begin // size, self.processes):
            low, high = max(begin, rank * size), min(begin + length, (rank + 1) * size, numel)
            if low >= high:
                break
            stored = self._file(rank).get_slice(name)
            if stored.get_shape() != [held := min(size, numel - rank * size)]:
                raise CheckpointError(
                    f"{_path(self.folder, rank)} does not fit: {name} has {stored.get_shape()} elements, not {held}"
                )
            pieces.append((stored, slice(low - rank * size, high - rank * size)))
        return pieces

    def _file(self, rank: int) -> Any:
        if rank not in self._opened:
            if not (path := _path(self.folder, rank)).is_file():
                raise CheckpointError(
                    f"{path} is missing: the checkpoint does not hold all weights of a reference; resume with the "
                    "reference.sync_ref_model that it was saved with"
                )
            self._opened[rank] = safe_open(path, framework="pt").__enter__()
        return self._opened[rank]


@torch.no_grad()
def _fill(engine: InferenceEngine, files: _Files) -> None:
    """Everything is found before anything is written: a checkpoint that does not fit changes nothing."""
    shapes, begins = engine.whole_shapes(), engine.begins_of_shares()
    shares = dict(engine.named_shares())
    found = {
        name: files.find(name, math.prod(shapes[name]), begins[name], len(share)) for name, share in shares.items()
    }
    for name, pieces in found.items():
        if pieces:  # a rank may hold nothing of a small parameter
            shares[name].copy_(torch.cat([stored[part] for stored, part in pieces]))


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
