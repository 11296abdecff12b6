"""The `checkpoints/` folder of a run: save, find, retention.

    checkpoints/step-000012/      manifest.json  state.json  rng-rank00000.{json,safetensors}  shards/  model_assets/
    checkpoints/latest            the name of the newest one, for people and scripts
    checkpoints/.tmp-*            being written or deleted; left behind by a crash, removed at the next start
    checkpoints/.replaced-*       the former checkpoint of a step while its successor takes its place

A checkpoint appears by one rename, after every byte of it is on the device. All ranks have to see the folder.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from dpo_dist.checkpoint.agreeing import on_every_rank, on_first_rank
from dpo_dist.checkpoint.export import ASSETS_FOLDER
from dpo_dist.checkpoint.files import free_bytes, human_bytes, publish, remove_path, replace_text, sync_folders
from dpo_dist.checkpoint.listing import STAGING_PREFIX, apply_limit, by_age, candidates, clean_up
from dpo_dist.checkpoint.manifest import (
    LATEST_FILE,
    FileRecord,
    Manifest,
    checkpoint_meant_by,
    hash_file,
    held_bytes,
    list_files,
    verify,
)
from dpo_dist.checkpoint.parts import Part, Writing, settled
from dpo_dist.checkpoint.state import STATE_FILE, RunState, read_rng, write_rng
from dpo_dist.distributed import Ranks, all_gather_json, broadcast_json
from dpo_dist.durable import sync
from dpo_dist.errors import CheckpointError, NoUsableCheckpointError, StorageError
from dpo_dist.phases import inject, reach

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Pending:
    """A checkpoint that has no name yet. Nothing in it changes while training goes on."""

    text: str  # of the state
    best: Path  # where the best checkpoint is, if there is one
    final: Path
    needed: int
    writing: Writing


class CheckpointStore:
    """Saves and finds the checkpoints of one run. `save` and `find` are collective: all ranks call them and agree.

    Args:
        run_dir: `train.output_dir`.
        ranks: Where this process stands.
        save_total_limit: How many checkpoints to keep, the newest, and the best besides; None keeps all.
    """

    def __init__(self, run_dir: Path, ranks: Ranks, save_total_limit: int | None = None) -> None:
        self.folder = run_dir / "checkpoints"
        self.ranks = ranks
        self.save_total_limit = save_total_limit
        self._pending: Pending | None = None

    # ---- save

    def save(
        self,
        state: RunState,
        write: Callable[[Path], Sequence[Part] | None],
        extra: Callable[[Path], None] | None = None,
        before: Callable[[], None] = lambda: None,
        in_background: bool = False,
    ) -> Path | None:
        """Write a checkpoint. When that fails, the earlier ones stay as they are and training may go on.

        Args:
            state: What `load_state` will return.
            write: Called on every rank with the folder to fill; returns what is left to be written, and what may be
                hashed by this rank. If collective, it must not leave another rank waiting when it raises
                (`shards.save_shards` does not).
            extra: Called on the first rank only, with the same folder: `export.write_assets`.
            before: Called on the first rank first; what it writes is as durable as the checkpoint.
            in_background: Return as soon as a thread can write it; `finish` gives it its name.
        Returns:
            The new checkpoint; None in the background.
        Raises:
            StorageError: on every rank, if the disk is full or a file cannot be written.
        """
        assert self._pending is None, "one at a time"
        reach("save")
        # At once: the run's own numbers change while a thread writes.
        final, text = self.path_of(state.step), state.to_text()
        staging = self.folder / f"{STAGING_PREFIX}{final.name}"
        with self._removing(staging):
            needed = self._on_first_rank(lambda: before() or self._open_staging(staging))
            # Before the collective write: a rank that cannot take part must not leave the others inside it.
            self._on_every_rank(lambda: self._require_visible(staging))
            parts = self._on_every_rank(lambda: self._parts(staging, write, extra), needed)
            writing = Writing(staging, parts)
            if in_background:
                self._on_every_rank(writing.begin)
        best = self.path_of(state.health.get("best_step", 0))
        self._pending = Pending(text, best, final, needed, writing)
        return None if in_background else self.finish()

    def finish(self) -> Path | None:
        """Wait until the checkpoint that is being saved is written, and give it its name. Collective.

        Returns:
            The new checkpoint; None if none is being saved.
        Raises:
            StorageError: on every rank, if the disk is full or a file cannot be written.
        """
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        staging, needed = pending.writing.staging, pending.needed
        with self._removing(staging):
            shares = all_gather_json(self._on_every_rank(pending.writing.finish, needed))
            reach("commit")
            records = {name: FileRecord(**values) for share in shares for name, values in share.items()}
            self._on_first_rank(lambda: self._commit(pending, records), needed)
        reach("limit")
        self._on_first_rank(lambda: apply_limit(self.folder, self.save_total_limit, pending.best))
        reach("saved")
        return pending.final

    def as_tensor(self, device: torch.device) -> Tensor:
        """1 if this rank has written its part of a checkpoint that waits for its name, else 0; shape (1,), float64."""
        written = self._pending is not None and self._pending.writing.is_over
        return torch.tensor([float(written)], dtype=torch.float64, device=device)

    @contextmanager
    def _removing(self, staging: Path) -> Iterator[None]:
        """What is left of a checkpoint that could not be written goes."""
        try:
            yield
        except Exception:
            if self.ranks.is_first:
                remove_path(staging)
            raise

    def path_of(self, step: int) -> Path:
        """Where the checkpoint of a step is, if there is one."""
        return self.folder / f"step-{step:06d}"

    def _open_staging(self, staging: Path) -> int:
        """Make an empty folder to write to; returns how many bytes the checkpoint will need, 0 if that is unknown."""
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_path(staging)
        needed = held_bytes(earlier[-1]) if (earlier := by_age(self.folder)) else 0
        if (free := free_bytes(self.folder)) < needed:
            said = f"disk full: need {human_bytes(needed)}, have {human_bytes(free)}"
            raise StorageError(f"{self.folder}: {said}; free some space or lower checkpoint.save_total_limit")
        staging.mkdir()
        return needed

    def _require_visible(self, staging: Path) -> None:
        if not staging.is_dir():
            raise CheckpointError(
                f"train.output_dir={self.folder.parent} is not the same folder on rank {self.ranks.rank} as on rank 0; "
                "put it on a file system that all nodes share"
            )

    def _parts(
        self,
        staging: Path,
        write: Callable[[Path], Sequence[Part] | None],
        extra: Callable[[Path], None] | None,
    ) -> list[Part]:
        parts = list(write(staging) or ())
        write_rng(staging, self.ranks.rank)
        if self.ranks.is_first and extra is not None:
            parts.append(Part(staging / ASSETS_FOLDER, lambda: extra(staging)))
        return parts

    def _commit(self, pending: Pending, records: dict[str, FileRecord]) -> None:
        staging = pending.writing.staging
        # What no rank has claimed is small, as the states of random generators.
        left = [name for name in list_files(staging) if name not in records]
        records |= {name: FileRecord(**values) for name, values in settled(staging, left).items()}
        (staging / STATE_FILE).write_text(pending.text, encoding="utf-8")
        sync(staging / STATE_FILE)
        records[STATE_FILE] = hash_file(staging / STATE_FILE)
        newest = by_age(self.folder)[-1:]
        sequence = Manifest.read(newest[0]).sequence + 1 if newest else 0
        inject("save.manifest")
        Manifest(sequence, records).write(staging)
        sync_folders(staging)
        inject("save.publish")
        publish(staging, pending.final)
        inject("save.latest")
        replace_text(self.folder / LATEST_FILE, pending.final.name + "\n")

    # ---- find and load

    def find(self, resume: str, look_only: bool = False) -> Path | None:
        """The checkpoint to resume from, verified; None when there is nothing to resume.

        Args:
            resume: `checkpoint.resume`: `never`, `auto` (the newest that verifies) or the path of a checkpoint.
            look_only: Trust the sizes of files, and leave what an interrupted save has left: a run may be saving now.
        Raises:
            CheckpointError: if the named folder is no usable checkpoint.
            NoUsableCheckpointError: with `auto`, if checkpoints exist and none verifies.
        """
        if resume == "never":
            return None
        if not look_only:
            self._on_first_rank(lambda: clean_up(self.folder))
        folder = self._newest_verified(look_only) if resume == "auto" else self._verified(resume, look_only)
        return folder

    def load_state(self, folder: Path) -> RunState:
        """The state a checkpoint was saved with."""
        return RunState.read(folder / STATE_FILE)

    def restore_rng(self, folder: Path) -> None:
        """Set this rank's random generators to where they stood when the checkpoint was saved.

        A rank that was not there takes another's; nothing that is computed draws from them.
        """
        read_rng(folder, self.ranks.rank % max(1, len(list(folder.glob("rng-rank*.json")))))

    def _verified(self, resume: str, look_only: bool) -> Path:
        folder = Path(broadcast_json(str(Path(resume).expanduser().resolve())))
        if (fault := self._fault(folder, look_only)) is None:
            return folder
        meant = checkpoint_meant_by(folder)
        hint = f"did you mean {meant}?" if meant else "name another one, or auto"
        raise CheckpointError(f"checkpoint.resume={resume} cannot be used: {fault}; {hint}")

    def _newest_verified(self, look_only: bool) -> Path | None:
        folders = [Path(path) for path in self._on_first_rank(lambda: list(map(str, candidates(self.folder))))]
        faults = []
        for folder in folders:
            if (fault := self._fault(folder, look_only)) is None:
                if self.ranks.is_first:
                    self._report_latest(folder)
                return folder
            faults.append(fault)
            if self.ranks.is_first:
                logger.warning("checkpoint.resume=auto skips a damaged checkpoint: %s", fault)
        if faults:
            raise NoUsableCheckpointError(
                f"checkpoint.resume=auto: none of the {len(faults)} checkpoints in {self.folder} can be used; restore "
                "one from a copy, or choose another train.output_dir to start from the beginning:\n  "
                + "\n  ".join(faults)
            )
        return None

    def _fault(self, folder: Path, look_only: bool) -> str | None:
        """What is wrong with a checkpoint, the same text on every rank; each rank reads its share of the files."""
        fault = None
        reach("verify")
        try:
            verify(folder, None if look_only else (self.ranks.rank, self.ranks.world_size))
        except (CheckpointError, OSError) as error:
            fault = str(error)
        return next((theirs for theirs in all_gather_json(fault) if theirs is not None), None)

    def _report_latest(self, folder: Path) -> None:
        latest = self.folder / LATEST_FILE
        named = latest.read_text(encoding="utf-8", errors="replace").strip() if latest.is_file() else None
        if named != folder.name:
            says = "is missing" if named is None else f"names {named!r}" if named else "is empty"
            logger.warning("%s %s; resuming from %s, the newest checkpoint that verifies", latest, says, folder.name)

    def _on_first_rank(self, action: Callable[[], Any], needed: int = 0) -> Any:
        return on_first_rank(self.ranks, self.folder, action, needed)

    def _on_every_rank(self, action: Callable[[], T], needed: int = 0) -> T:
        return on_every_rank(self.folder, action, needed)
