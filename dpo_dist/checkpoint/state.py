"""The part of a run's state that is ours: counters as JSON, random generators as JSON and safetensors. No pickle."""

import dataclasses
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dpo_dist.checkpoint.strict_json import parse
from dpo_dist.errors import CheckpointError, NumericsError
from dpo_dist.health import Health
from dpo_dist.metrics import RewardMean, Window

STATE_FILE = "state.json"


@dataclass(frozen=True)
class RunState:
    """Where a run stands: with weights and random generators, all it takes to go on as if it had not stopped."""

    step: int
    """Optimizer steps completed."""
    examples_seen: int
    """Examples that went into those steps."""
    seed: int
    num_tokens: int
    """Tokens the policy has processed since the run's start."""
    pairs_seen: int
    """Preference pairs scored since the run's start."""
    metrics_window: dict[str, Any]
    """Sums of a logging interval that has begun and is not written yet; JSON values."""
    health: dict[str, Any]
    """What has been seen of the run's health, and its best evaluation; JSON values."""
    reference_identity: str
    """Hash of the reference's weights and settings."""
    data_fingerprint: str
    """Hash of the training data's token ids and pairs."""
    world_size: int
    """Number of processes that wrote the shards."""
    config: dict[str, dict[str, Any]]
    """The resolved configuration."""
    rewards: dict[str, float] = dataclasses.field(default_factory=dict)
    """Those of rated completions, added up (BCO)."""

    def to_text(self) -> str:
        """The state as JSON; floats survive exactly.

        Raises:
            NumericsError: a number is not finite; `read` would refuse it.
        """
        try:
            text = json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True, allow_nan=False)
        except ValueError as error:
            raise NumericsError(f"the state after step {self.step} cannot be saved ({error})") from None
        return text + "\n"

    @classmethod
    def read(cls, path: Path) -> "RunState":
        """Read what `to_text` gave.

        Raises:
            CheckpointError: if the file is missing, broken, or holds other fields than this version's.
        """
        try:
            text = path.read_text(encoding="utf-8")
            values = parse(text)
            _require_fields(values)
            TypeAdapter(cls).validate_json(text, strict=True)
            # What is in them is theirs; here, so that a checkpoint whose state cannot be used is passed over.
            Health.from_json(values["health"])
            Window.from_json(values["metrics_window"])
            RewardMean.from_json(values.get("rewards", {}))
            return cls(**values)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read; it is not a checkpoint of this program ({error})") from None
        except ValueError as error:
            raise CheckpointError(f"{path} does not hold the state of a run: {_in_one_line(error)}") from None


def _in_one_line(error: ValueError) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def _require_fields(values: object) -> None:
    if not isinstance(values, dict):
        raise ValueError("it is not a JSON object")
    known = {field.name: field.default_factory for field in dataclasses.fields(RunState)}
    missing = {name for name, default in known.items() if default is dataclasses.MISSING} - values.keys()
    if unlike := sorted(missing | (values.keys() - known.keys())):
        raise ValueError(f"missing or unknown: {', '.join(unlike)}; another version of dpo-dist wrote it")


def require_same(folder: Path, facts: Mapping[str, tuple[object, object]]) -> None:
    """Refuse to resume a checkpoint of another run.

    Args:
        folder: The checkpoint, for the message.
        facts: What decides which run it is, under the name that users know: the checkpoint's value, and this run's.
    Raises:
        CheckpointError: naming everything that differs, with both values.
    """
    differing = [
        f"{name}={saved} (this run: {current})" for name, (saved, current) in facts.items() if saved != current
    ]
    if differing:
        raise CheckpointError(
            f"checkpoint.resume: {folder} belongs to another run: {', '.join(differing)}; "
            "resume with the configuration and data it was made with, or export it and start a new run from the model"
        )


def changed_settings(saved: RunState, config: Mapping[str, Any]) -> list[str]:
    """Settings that are not what they were when a checkpoint was saved, as `section.key: was -> is`.

    Args:
        saved: The state read from the checkpoint.
        config: This run's configuration, a mapping of keys for each section; where its output, checkpoints and logs go
            does not count.
    """
    own_affair = {"train.output_dir", *(f"checkpoint.{key}" for key in config.get("checkpoint", ()))}
    own_affair |= {f"log.{key}" for key in config.get("log", ())}
    was, now = (
        {f"{section}.{key}": value for section, keys in values.items() for key, value in keys.items()}
        for values in (saved.config, config)
    )
    return [
        f"{key}: {was.get(key)} -> {now.get(key)}"
        for key in sorted(was.keys() | now.keys())
        if key not in own_affair and was.get(key) != now.get(key)
    ]


def write_rng(folder: Path, rank: int) -> None:
    """Write the state of every random generator of this process to `rng-rank00000.json` and `.safetensors`."""
    python_version, python_words, python_gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=True)
    kind, numpy_words, position, has_gauss, cached_gauss = numpy_state
    tensors = {"torch_cpu": torch.get_rng_state(), "numpy": torch.from_numpy(numpy_words.astype(np.int64))}
    if torch.cuda.is_available():
        tensors["torch_cuda"] = torch.cuda.get_rng_state()
    values = {
        "python": [python_version, list(python_words), python_gauss],
        "numpy": [kind, int(position), int(has_gauss), float(cached_gauss)],
    }
    save_file(tensors, _rng_file(folder, rank, "safetensors"))
    _rng_file(folder, rank, "json").write_text(json.dumps(values) + "\n", encoding="utf-8")


def read_rng(folder: Path, rank: int) -> None:
    """Set every random generator of this process to what `write_rng` found.

    Raises:
        CheckpointError: if this rank has no file there, or a broken one.
    """
    try:
        tensors = load_file(_rng_file(folder, rank, "safetensors"))
        values = parse(_rng_file(folder, rank, "json").read_text(encoding="utf-8"))
        kind, position, has_gauss, cached_gauss = values["numpy"]
        version, words, gauss = values["python"]
        random.setstate((version, tuple(words), gauss))
        np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, cached_gauss))
        torch.set_rng_state(tensors["torch_cpu"])
        # A checkpoint made on a GPU may be resumed on a CPU, where there is no such generator to set.
        if torch.cuda.is_available() and "torch_cuda" in tensors:
            torch.cuda.set_rng_state(tensors["torch_cuda"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{folder}: the random state of rank {rank} cannot be restored ({error})") from error


def _rng_file(folder: Path, rank: int, suffix: str) -> Path:
    return folder / f"rng-rank{rank:05d}.{suffix}"
