"""Parameters, one at a time, into a folder of safetensors that transformers loads.

They leave in shards, so that no process ever holds the whole model. The folder appears by one rename, after
transformers has accepted it: every key it expects is there, with the right shape, and no other.
"""

import copy
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from dpo_dist.checkpoint.files import claim_staging, publish, remove_path, sync_folders
from dpo_dist.durable import sync
from dpo_dist.errors import CheckpointError

logger = logging.getLogger(__name__)

MAX_SHARD_BYTES = 2_000_000_000  # a file is put together in memory


class ModelWriter:
    """Fills a temporary folder with safetensors shards, checks it, and gives it its name."""

    def __init__(self, out: Path, model_config: Any, max_shard_bytes: int, trust_remote_code: bool) -> None:
        self.out = out
        self.max_shard_bytes = max_shard_bytes
        self.trust_remote_code = trust_remote_code
        config = copy.deepcopy(model_config)
        config._attn_implementation = "eager"  # every architecture has it; this model only says which tensors there are
        with torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        self.expected = self.model.state_dict()
        # Tied weights stand in the file once, under the name transformers ties the others to.
        self.primary_of: dict[str, str] = dict(getattr(self.model, "all_tied_weights_keys", {}))
        self.digests: dict[str, str] = {}
        self.added: set[str] = set()
        self.pending: dict[str, Tensor] = {}
        self.pending_bytes = self.total_bytes = 0
        self.shards: list[list[str]] = []
        self.staging, self._held = claim_staging(out)

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one parameter or buffer; the tensor may change or vanish afterwards."""
        if name not in self.expected:
            raise CheckpointError(
                f"{name} is not a parameter of {type(self.model).__name__}; the model was not written"
            )
        shape = tuple(self.expected[name].shape)
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{name} has shape {tuple(tensor.shape)}, expected {shape}; the model was not written"
            )
        primary = self.primary_of.get(name, name)
        if self._is_repeated(name, primary, tensor):
            return
        self.added.add(primary)
        # A copy: the engine frees what it gathered as soon as it is asked for the next one.
        whole = tensor.detach().to("cpu", copy=True).contiguous()
        # Some architectures compute with other tensors than their files hold (fused experts).
        for saved_name, saved in revert_weight_conversion(self.model, {primary: whole}).items():
            size = saved.numel() * saved.element_size()
            if self.pending and self.pending_bytes + size > self.max_shard_bytes:
                self._write_shard()
            self.pending[saved_name] = saved.contiguous()
            self.pending_bytes += size
            self.total_bytes += size

    def _is_repeated(self, name: str, primary: str, tensor: Tensor) -> bool:
        """Whether this weight was added under another name already; it must then be the same."""
        tied = primary in self.primary_of.values()
        if not tied and primary in self.added:
            raise CheckpointError(f"{name} was given twice; the model was not written")
        if not tied:
            return False
        digest = _digest(tensor)
        if self.digests.setdefault(primary, digest) != digest:
            raise CheckpointError(
                f"{name} differs from {primary}, which the configuration ties it to; check its training"
            )
        return primary in self.added

    def finish(self) -> None:
        """Write what is left, check the folder, and give it its name."""
        needed = {self.primary_of.get(str(name), str(name)) for name in self.expected}
        if missing := sorted(needed - self.added):
            listed = ", ".join(missing[:5])
            raise CheckpointError(f"{len(missing)} parameters are missing, first {listed}; the model was not written")
        self._write_shard()
        self._name_shards()
        for path in sorted(self.staging.rglob("*")):
            if path.is_file():
                sync(path)
        sync_folders(self.staging)
        _require_loadable(self.staging, self.trust_remote_code)
        publish(self.staging, self.out)
        self._release()
        logger.info("trained model written to %s: %d tensors, %d bytes", self.out, len(self.added), self.total_bytes)

    def discard(self) -> None:
        """Leave nothing behind of a model that was not written."""
        remove_path(self.staging)
        self._release()

    def _release(self) -> None:
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def _write_shard(self) -> None:
        self.shards.append(sorted(self.pending))
        path = self.staging / f"shard-{len(self.shards)}.safetensors"
        save_file(self.pending, path, metadata={"format": "pt"})
        set_usual_mode(path)
        with safe_open(path, framework="pt") as written:
            for name, tensor in self.pending.items():
                if not torch.equal(_as_bytes(written.get_tensor(name)), _as_bytes(tensor)):
                    raise CheckpointError(f"{path}: {name} reads back differently than it was written; check the disk")
        self.pending, self.pending_bytes = {}, 0

    def _name_shards(self) -> None:
        """Files carry the number of files in their names, which is known only now."""
        count = len(self.shards)
        names = [f"model-{index:05d}-of-{count:05d}.safetensors" for index in range(1, count + 1)]
        if count == 1:
            names = ["model.safetensors"]
        for index, name in enumerate(names, start=1):
            os.rename(self.staging / f"shard-{index}.safetensors", self.staging / name)
        if count > 1:
            weight_map = {key: name for name, keys in zip(names, self.shards, strict=True) for key in keys}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            text = json.dumps(index, indent=2) + "\n"
            (self.staging / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _require_loadable(folder: Path, trust_remote_code: bool) -> None:
    """transformers must accept the folder: no key missing, unexpected or of another shape. Loads no data."""
    with _no_progress_bars():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            device_map="meta",
            output_loading_info=True,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
        )
    _, report = loaded  # a model and what was wrong with its keys
    if faults := {what: sorted(map(str, keys)) for what, keys in report.items() if keys}:
        raise CheckpointError(f"{folder} does not load as it should: {faults}; the model was not written")


def set_usual_mode(path: Path) -> None:
    """safetensors makes files that only their owner may read."""
    path.chmod(0o666 & ~_umask())


def _umask() -> int:
    # The only way to read it is to set it.
    current = os.umask(0o077)
    os.umask(current)
    return current


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(_as_bytes(tensor).numpy().data).hexdigest()


def _as_bytes(tensor: Tensor) -> Tensor:
    # Bytes: numpy knows no bfloat16, and a NaN does not equal itself.
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    enabled = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers.utils.logging.enable_progress_bar()
