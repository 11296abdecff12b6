"""Everything that an update changes, in a checkpoint's folder."""

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dpo_dist.checkpoint.parts import Part
from dpo_dist.checkpoint.shards import load_shards, save_shards
from dpo_dist.engine import InferenceEngine, RankAllocation, TrainingEngine
from dpo_dist.errors import CheckpointError
from dpo_dist.phases import reach
from dpo_dist.reference import load_reference, save_reference

_ALLOCATION = "rank_allocation"


@dataclass(frozen=True)
class Weights:
    """The policy, and a reference that follows it."""

    policy: TrainingEngine
    reference: InferenceEngine | None  # None where it is frozen: its own folder has it

    def write(self, folder: Path, copies: bool = False) -> list[Part]:
        """This rank's part. Collective.

        Args:
            folder: of the checkpoint.
            copies: only copy to host memory what is large; what is returned writes the files.
        Raises:
            OSError, RuntimeError: what this rank's own write raised; the other ranks return normally.
        """
        parts = save_shards(self.policy.engine, folder, copies)
        if self.reference is not None:
            parts += [Part(path, write) for path, write in save_reference(self.reference, folder, copies)]
        if self.policy.allocation is not None and self.policy.ranks.is_first:
            tensors, values = self.policy.allocation.state()
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, _file(folder, "safetensors"))
            _file(folder, "json").write_text(json.dumps(values) + "\n", encoding="utf-8")
        return parts

    def read(self, folder: Path) -> None:
        """Set all of it to what a verified checkpoint holds. Collective.

        Raises:
            CheckpointError: it is not there, or belongs to another model.
        """
        reach("restore")
        load_shards(self.policy.engine, folder)
        if self.reference is not None:
            load_reference(self.reference, folder)
        if self.policy.allocation is not None:
            _read_allocation(self.policy.allocation, folder)


def _read_allocation(allocation: RankAllocation, folder: Path) -> None:
    try:
        values = json.loads(_file(folder, "json").read_text(encoding="utf-8"))
        allocation.load_state(load_file(_file(folder, "safetensors")), values)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: AdaLoRA's allocation of ranks cannot be restored ({error})") from error


def _file(folder: Path, suffix: str) -> Path:
    return folder / f"{_ALLOCATION}.{suffix}"
