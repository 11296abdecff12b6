"""DeepSpeed's shard files: write and load.

Both take DeepSpeed's engine as it is (this file does not import DeepSpeed) and put two things right while it works: a
write error of one rank no longer leaves the others waiting in a barrier, and nothing is unpickled without restriction.

DeepSpeed loads what as many processes have saved at the same stage. What others have saved is shared out anew: each
rank reads the elements that it holds (`saved_states`, docs/decisions/0019).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from dpo_dist.checkpoint.parts import Part, on_host
from dpo_dist.checkpoint.pickles import load_restricted
from dpo_dist.checkpoint.saved_states import SHARDS_FOLDER, Layout, SavedStates, layout_at, layout_of
from dpo_dist.distributed import launched_rank
from dpo_dist.engine import masters_of, optimizer_order, set_states
from dpo_dist.errors import CheckpointError, StorageError
from dpo_dist.peers import raise_if_peer_lost


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
    _require_shapes(held, trained, "adapter that is trained; resume with the settings of the section adapter that it")


def _require_shapes(held: dict[str, tuple[int, ...]], trained: dict[str, tuple[int, ...]], whose: str) -> None:
    for name in sorted(trained.keys() | held.keys()):
        if held.get(name) != trained.get(name):
            raise CheckpointError(
                f"{name} has shape {held.get(name, 'none')} in the checkpoint and {trained.get(name, 'none')} in the "
                f"{whose} was made with"
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
    """Set weights and optimizer to those of a verified checkpoint, whoever saved it. Collective.

    Raises:
        CheckpointError: if the shards are not there, or belong to another model.
        PeerLostError: if another rank is gone.
    """
    saved = layout_of(folder)
    if saved is None:
        raise CheckpointError(f"{folder} holds no shards, or not all of them; resume from another checkpoint")
    try:
        if saved == _own_layout(deepspeed_engine) and _is_alike(deepspeed_engine, folder):
            _load_as_saved(deepspeed_engine, folder)
        else:
            _share_out(deepspeed_engine, folder)
    except CheckpointError:
        raise
    except (RuntimeError, KeyError, ValueError, AssertionError) as error:
        raise_if_peer_lost(error)
        raise CheckpointError(f"{folder} does not fit the model or its optimizer ({error})") from error


def _own_layout(deepspeed_engine: Any) -> Layout:
    return layout_at(int(deepspeed_engine.zero_optimization_stage()), torch.distributed.get_world_size())


def _is_alike(deepspeed_engine: Any, folder: Path) -> bool:
    """Whether this run's dtype and the other options of its DeepSpeed file lay parameters out as they were saved."""
    wrapper = deepspeed_engine.optimizer
    if _is_on_nvme(wrapper):
        return True  # only DeepSpeed finds what lies there
    states = SavedStates(folder)
    if states.layout.kind == "whole":
        return states.is_halved == bool(masters_of(wrapper))
    own = [list(group) for group in deepspeed_engine._get_zero_param_shapes()]
    return (
        states.layout.prefix == ("bf16_" if deepspeed_engine.bfloat16_enabled() else "")
        and [list(group) for group in states.model["param_shapes"]] == own
        and states.alignment() == getattr(wrapper, "round_robin_bit16_padding", None)
    )


def _is_on_nvme(wrapper: Any) -> bool:
    return bool(getattr(wrapper, "swap_optimizer", False) or getattr(wrapper, "params_in_nvme_and_cpu", False))


def _load_as_saved(deepspeed_engine: Any, folder: Path) -> None:
    with _guarded(deepspeed_engine) as shard_io:
        strict = shard_io.trained is None
        # Without a `latest` file or shards DeepSpeed only warns, returns None and trains from step 0.
        path, _ = deepspeed_engine.load_checkpoint(str(folder), tag=SHARDS_FOLDER, load_module_strict=strict)
    if path is None:
        raise CheckpointError(f"{folder} holds no shards for this ZeRO stage; resume with its own")


def _share_out(deepspeed_engine: Any, folder: Path) -> None:
    wrapper = deepspeed_engine.optimizer
    if _is_on_nvme(wrapper):
        raise CheckpointError(
            f"{folder} was saved by other processes, and what this run keeps on NVMe cannot be shared out anew"
        )
    states = SavedStates(folder, optimizer_order(deepspeed_engine))
    named = deepspeed_engine.module.named_parameters()
    trained = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in named if p.requires_grad}
    _require_shapes(states.shapes, trained, "model that is trained; resume with the model and adapter that it")
    set_states(deepspeed_engine, states)
    deepspeed_engine.global_steps = states.model["global_steps"]
    deepspeed_engine.global_samples = states.model["global_samples"]
    deepspeed_engine.skipped_steps = states.model["skipped_steps"]
