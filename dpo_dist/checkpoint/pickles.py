"""Which pickled classes a shard may name, checked before anything is unpickled.

DeepSpeed saves its shards with `torch.save` and loads them with `weights_only=False`: whoever can write a shard can run
code. A file passes here if torch's restricted unpickler loads it with nothing more than the classes listed below, which
executes none of the file's own calls.
"""

import importlib
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from dpo_dist.errors import CheckpointError

# Found by saving at stages 0-3 in float32 and bfloat16, held by a test. DynamicLossScaler is what fp16 saves on a GPU.
ALLOWED_GLOBALS = (
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.utils.tensor_fragment.fragment_address",
)


@contextmanager
def allowed_globals() -> Iterator[None]:
    """Let `torch.load(weights_only=True)` build the classes of ALLOWED_GLOBALS."""
    # By name and late: verifying a checkpoint must not start DeepSpeed in a program that never trains.
    owners = [name.rpartition(".") for name in ALLOWED_GLOBALS]
    with safe_globals([getattr(importlib.import_module(module), attribute) for module, _, attribute in owners]):
        yield


def load_restricted(path: Path | str, map_location: Any = "cpu", mmap: bool = False) -> Any:
    """`torch.load` of a shard that can build tensors, containers, the classes of ALLOWED_GLOBALS, and nothing else.

    Raises:
        CheckpointError: if the file asks for more than that; nothing of it was executed.
    """
    try:
        with allowed_globals():
            return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} holds more than tensors and plain values; it is not loaded") from error


def require_harmless(path: Path, name: str) -> None:
    """Refuse a shard that is not a torch archive of plain data. Reads the pickle, not the tensors.

    Args:
        path: The file.
        name: How the message calls it.
    Raises:
        CheckpointError: naming the file and what it would import.
    """
    try:
        foreign = sorted(set(get_unsafe_globals_in_checkpoint(str(path))) - set(ALLOWED_GLOBALS))
    except Exception as error:  # the file is not trusted: whatever its parsing raises means the same
        raise CheckpointError(
            f"{name} is not a torch archive that can be inspected; it is not loaded ({error})"
        ) from None
    if foreign:
        raise CheckpointError(
            f"{name} would import {', '.join(foreign)} while loading; it is not loaded: "
            "a checkpoint of this program holds tensors and plain values only"
        )
    # The list of names sees no class that is made up while unpickling; the restricted unpickler does.
    load_restricted(path, mmap=True)
