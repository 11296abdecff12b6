"""DeepSpeed's shard files: write, load, and read the full parameters from them offline.

Writing and loading take DeepSpeed's engine as it is (this file does not import DeepSpeed) and put two things right
while it works: a write error of one rank no longer leaves the others waiting in a barrier, and nothing is unpickled
without restriction. Reading offline needs no engine, no process group and no GPU.

Layout, DeepSpeed 0.19, one model-parallel rank:

| stages | full parameters are in |
|---|---|
| 0, 1, 2 | `mp_rank_00_model_states.pt`: `module`, as the model computes with them |
| 3 | `*zero_pp_rank_R_mp_rank_00_optim_states.pt`: float32, the R-th of equal parts of each parameter, padded |

Where an adapter is trained, its parameters alone are written: the frozen ones are in the base model's folder.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpo_dist.checkpoint.parts import Part, on_host
from dpo_dist.checkpoint.pickles import load_restricted
from dpo_dist.distributed import launched_rank
from dpo_dist.errors import CheckpointError, StorageError
from dpo_dist.peers import raise_if_peer_lost

SHARDS_FOLDER = "shards"
# The engine trains a module that holds the language model as its attribute `model`.
WRAPPER_PREFIX = "model."
# Virtual tokens stand beside the language model.
VIRTUAL_PREFIX = "prompt_encoder."
_OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")


class _ShardIO:
    """Stands in for DeepSpeed's checkpoint engine: keeps the first write error for later, and loads restricted."""

    def __init__(self, inner: Any, trained: dict[str, tuple[int, ...]] | None, copies: bool = False) -> None:
        self.inner = inner
        self.trained = trained  # names and whole shapes of an adapter's parameters; None: all weights are trained
        self.copies = copies  # whether files are written later, from copies
        self.parts: list[Part] = []
        self.error: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Create a folder, or remember why not."""
        self._attempt(self.inner.makedirs, path, exist_ok=exist_ok)

    def save(self, state_dict: Any, path: str) -> None:
        """Write a file, or remember why not."""
        if self.trained is not None and "module" in state_dict:
            # DeepSpeed leaves frozen parameters out by name, and would keep those that are tied to one.
            kept = {name: value for name, value in state_dict["module"].items() if name in self.trained}
            state_dict = {**state_dict, "module": kept}
        state_dict = without_enums(state_dict)
        if self.copies:
            self._attempt(self._copy, state_dict, Path(path))
            return
        self._attempt(self.inner.save, state_dict, path)
        self.parts.append(Part(Path(path)))

    def _copy(self, state_dict: Any, path: Path) -> None:
        try:
            copied = on_host(state_dict)
        except (MemoryError, RuntimeError) as error:
            raise StorageError(
                f"{path.parent}: the copy that checkpoint.async_save=true makes does not fit into host memory "
                f"({error}); set it to false"
            ) from error
        self.parts.append(Part(path, lambda: self.inner.save(copied, str(path))))

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read a file without executing anything from it."""
        state = load_restricted(path, map_location)
        if self.trained is not None and "module" in state:
            _require_trained(state, self.trained)
        return state

    def _attempt(self, action: Any, *args: Any, **kwargs: Any) -> None:
        if self.error is not None:
            return
        try:
            action(*args, **kwargs)
        except Exception as error:  # raised again after DeepSpeed's last barrier
            self.error = error


def without_enums(value: Any) -> Any:
    """The same with every member of an enumeration as the number or text that it stands for.

    Some versions of Python 3.11 pickle a member as a call of `getattr`, which no restricted unpickler may run.
    """
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return type(value)((key, without_enums(item)) for key, item in value.items())
    if type(value) in (list, tuple):  # a named tuple is not built from one argument
        return type(value)(without_enums(item) for item in value)
    return value


@contextmanager
def _guarded(deepspeed_engine: Any, copies: bool = False) -> Iterator[_ShardIO]:
    shard_io = _ShardIO(deepspeed_engine.checkpoint_engine, _trained(deepspeed_engine), copies)
    deepspeed_engine.checkpoint_engine = shard_io
    # DeepSpeed puts two executable scripts into each checkpoint; `dpo-dist export` does what they do.
    deepspeed_engine._copy_recovery_script = lambda save_path: None
    try:
        yield shard_io
    finally:
        deepspeed_engine.checkpoint_engine = shard_io.inner
        del deepspeed_engine._copy_recovery_script


def _trained(deepspeed_engine: Any) -> dict[str, tuple[int, ...]] | None:
    module: Any = getattr(deepspeed_engine, "module", None)
    if getattr(module, "adapter", None) is None:
        return None
    named = module.named_parameters()
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in named if p.requires_grad}


def _require_trained(state: dict[str, Any], trained: dict[str, tuple[int, ...]]) -> None:
    """An adapter's shards are loaded beside weights that are not in them: what is missing must be seen here."""
    held = {name: tuple(value.shape) for name, value in state["module"].items()}
    for group in state.get("param_shapes") or ():
        held |= {name: tuple(shape) for name, shape in group.items()}
    for name in sorted(trained.keys() | held.keys()):
        if held.get(name) != trained.get(name):
            raise CheckpointError(
                f"{name} has shape {held.get(name, 'none')} in the checkpoint and {trained.get(name, 'none')} in the "
                "adapter that is trained; resume with the settings of the section adapter that it was made with"
            )


def save_shards(deepspeed_engine: Any, folder: Path, copies: bool = False) -> list[Part]:
    """Write every rank's part of weights and optimizer to `folder/shards`. Collective.

    Args:
        deepspeed_engine: of the policy.
        folder: of the checkpoint.
        copies: only copy to host memory; what is returned writes the files.
    Returns:
        This rank's files.
    Raises:
        OSError, RuntimeError: what this rank's own write raised; the other ranks return normally.
    """
    with _guarded(deepspeed_engine, copies) as shard_io:
        adapted = {} if shard_io.trained is None else {"exclude_frozen_parameters": True}
        deepspeed_engine.save_checkpoint(str(folder), tag=SHARDS_FOLDER, save_latest=False, **adapted)
    if shard_io.error is not None:
        raise shard_io.error
    # What an optimizer keeps on NVMe DeepSpeed copies itself, at once.
    return [*shard_io.parts, Part(folder / SHARDS_FOLDER / "offloaded_tensors" / f"rank{launched_rank()}")]


def load_shards(deepspeed_engine: Any, folder: Path) -> None:
    """Set weights and optimizer to those of a verified checkpoint. Collective.

    Raises:
        CheckpointError: if the shards are not there, or belong to another model or ZeRO stage.
        PeerLostError: if another rank is gone.
    """
    _require_stage(deepspeed_engine, folder)
    try:
        with _guarded(deepspeed_engine) as shard_io:
            strict = shard_io.trained is None
            # Without a `latest` file or shards DeepSpeed only warns, returns None and trains from step 0.
            path, _ = deepspeed_engine.load_checkpoint(str(folder), tag=SHARDS_FOLDER, load_module_strict=strict)
    except CheckpointError:
        raise
    except (RuntimeError, KeyError, ValueError, AssertionError) as error:
        raise_if_peer_lost(error)
        raise CheckpointError(f"{folder} does not fit the model or its optimizer ({error})") from error
    if path is None:
        raise CheckpointError(f"{folder} holds no shards for this ZeRO stage; resume with its own")


def _require_stage(deepspeed_engine: Any, folder: Path) -> None:
    """DeepSpeed reads what another stage has saved with any error, or with one that says nothing.

    Stages 1 and 2 write alike, and read what the other has written.
    """
    saved, current = _saved_stage(folder / SHARDS_FOLDER), int(deepspeed_engine.zero_optimization_stage())
    if saved is None or saved == current or {saved, current} == {1, 2}:
        return
    raise CheckpointError(
        f"checkpoint.resume: {folder} was saved at ZeRO stage {saved}, and parallel.deepspeed of this run sets stage "
        f"{current}; resume with stage {saved}, or export it and start a new run from the model"
    )


def _saved_stage(folder: Path) -> int | None:
    """The ZeRO stage that shards were saved at; None if they do not tell."""
    if not folder.is_dir():
        return None
    paths = sorted(path for path in folder.iterdir() if _OPTIMIZER_FILE.fullmatch(path.name))
    if not paths:
        return 0 if (folder / "mp_rank_00_model_states.pt").is_file() else None
    stage = load_restricted(paths[0], mmap=True).get("optimizer_state_dict", {}).get("zero_stage")
    return int(stage) if stage in range(4) else None


def full_parameters(checkpoint: Path, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and full value of each parameter and persistent buffer, one at a time, on the CPU.

    Files are memory-mapped: the process holds one parameter, not the model.

    Args:
        checkpoint: A verified checkpoint.
        dtype: What the model computes with; the float32 parameters of stage 3 are rounded to it, as the optimizer did.
    Raises:
        CheckpointError: if a shard is missing or its layout is unknown.
    """
    folder = checkpoint / SHARDS_FOLDER
    whole = folder / "mp_rank_00_model_states.pt"
    tensors = _whole_module(whole) if whole.is_file() else _joined_partitions(folder, dtype)
    for name, tensor in tensors:
        if not name.startswith((WRAPPER_PREFIX, VIRTUAL_PREFIX)):
            raise CheckpointError(f"{checkpoint}: parameter {name} does not begin with {WRAPPER_PREFIX!r}")
        yield name.removeprefix(WRAPPER_PREFIX), tensor


def _whole_module(path: Path) -> Iterator[tuple[str, Tensor]]:
    yield from load_restricted(path, mmap=True)["module"].items()


def _joined_partitions(folder: Path, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    models = _model_states(folder)
    partitions = _flat_partitions(folder, len(models))
    first = models[0]
    for name in first["buffer_names"]:
        yield name, first["module"][name]

    # Frozen parameters have no optimizer state: each rank keeps its part beside the model.
    for name, shape in (first["frozen_param_shapes"] or {}).items():
        parts = [model["frozen_param_fragments"][name].flatten() for model in models]
        yield name, torch.cat(parts)[: shape.numel()].view(shape)

    shapes = {name: shape for group in first["param_shapes"] for name, shape in group.items()}
    lengths = {name: -(-shape.numel() // len(partitions)) for name, shape in shapes.items()}
    if (held := sum(len(flat) for flat in partitions[0])) != (needed := sum(lengths.values())):
        raise CheckpointError(f"{folder}: parameters need {needed} values of each rank, the shards hold {held}")
    offset = 0
    for name, shape in shapes.items():
        length = lengths[name]
        parts = [_slice(flat_groups, offset, length) for flat_groups in partitions]
        yield name, torch.cat(parts)[: shape.numel()].view(shape).to(dtype)
        offset += length


def _model_states(folder: Path) -> list[dict[str, Any]]:
    paths = sorted(folder.glob("zero_pp_rank_*_mp_rank_00_model_states.pt"), key=_rank_of)
    if [_rank_of(path) for path in paths] != list(range(len(paths))) or not paths:
        raise CheckpointError(f"{folder} holds no complete set of model shards")
    return [load_restricted(path, mmap=True) for path in paths]


def _flat_partitions(folder: Path, world_size: int) -> list[list[Tensor]]:
    """The float32 parameters of each rank, as the flat groups DeepSpeed keeps them in."""
    by_rank = {int(match[1]): path for path in folder.iterdir() if (match := _OPTIMIZER_FILE.fullmatch(path.name))}
    if sorted(by_rank) != list(range(world_size)):
        raise CheckpointError(f"{folder} has {world_size} model shards and optimizer shards of {sorted(by_rank)}")
    partitions = []
    for rank in range(world_size):
        state = load_restricted(by_rank[rank], mmap=True)["optimizer_state_dict"]
        flat_groups = state.get("fp32_flat_groups")
        if state.get("partition_count") != world_size or not flat_groups or not all(len(flat) for flat in flat_groups):
            raise CheckpointError(
                f"{by_rank[rank]} does not hold its part of the float32 parameters; "
                "export the model from a run without NVMe offload"
            )
        partitions.append(flat_groups)
    return partitions


def _slice(flat_groups: list[Tensor], offset: int, length: int) -> Tensor:
    """`torch.cat(flat_groups)[offset : offset + length]` without building the whole."""
    pieces = []
    for flat in flat_groups:
        pieces.append(flat[max(offset, 0) : max(offset + length, 0)])
        offset -= len(flat)
    return torch.cat(pieces)


def _rank_of(path: Path) -> int:
    return int(path.name.split("_")[3])
