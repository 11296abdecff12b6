"""Everything that an update changes, in a checkpoint's folder."""

from dataclasses import dataclass
from pathlib import Path

from dpo_dist.checkpoint.shards import load_shards, save_shards
from dpo_dist.engine import InferenceEngine, TrainingEngine
from dpo_dist.reference import load_reference, save_reference


@dataclass(frozen=True)
class Weights:
    """The policy, and a reference that follows it."""

    policy: TrainingEngine
    reference: InferenceEngine | None  # None where it is frozen: its own folder has it

    def write(self, folder: Path) -> None:
        """This rank's part. Collective.

        Raises:
            OSError, RuntimeError: what this rank's own write raised; the other ranks return normally.
        """
        save_shards(self.policy.engine, folder)
        if self.reference is not None:
            save_reference(self.reference, folder)

    def read(self, folder: Path) -> None:
        """Set all of it to what a verified checkpoint holds. Collective.

        Raises:
            CheckpointError: it is not there, or belongs to another model.
        """
        load_shards(self.policy.engine, folder)
        if self.reference is not None:
            load_reference(self.reference, folder)
