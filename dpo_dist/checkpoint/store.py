"""The `checkpoints/` folder of a run: save, find, retention.

    checkpoints/step-000012/      manifest.json  state.json  rng-rank00000.{json,safetensors}  shards/  model_assets/
    checkpoints/latest            the name of the newest one, for people and scripts
    checkpoints/.tmp-*            being written or deleted; left behind by a crash, removed at the next start
    checkpoints/.replaced-*       the former checkpoint of a step while its successor takes its place

A checkpoint appears by one rename, after every byte of it is on the device. All ranks have to see the folder.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from dpo_dist.checkpoint.files import (
    REPLACED_PREFIX,
    explain_write_error,
    free_bytes,
    human_bytes,
    publish,
    remove_path,
    replace_text,
    sync,
    sync_folders,
)
from dpo_dist.checkpoint.manifest import (
    LATEST_FILE,
    STEP_FOLDER,
    FileRecord,
    Manifest,
    checkpoint_meant_by,
    hash_file,
    held_bytes,
    list_files,
    verify,
)
from dpo_dist.checkpoint.pickles import require_harmless
from dpo_dist.checkpoint.state import STATE_FILE, RunState, read_rng, write_rng
from dpo_dist.distributed import Ranks, all_gather_json, broadcast_json, raise_together
from dpo_dist.errors import CheckpointError, NoUsableCheckpointError, StorageError

logger = logging.getLogger(__name__)

_STAGING = ".tmp-"

T = TypeVar("T")


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

    # ---- save

    def save(
        self,
        state: RunState,
        write_shards: Callable[[Path], None],
        extra: Callable[[Path], None] | None = None,
        before: Callable[[], None] = lambda: None,
    ) -> Path:
        """Write a checkpoint. When that fails, the earlier ones stay as they are and training may go on.

        Args:
            state: What `load_state` will return.
            write_shards: Called on every rank with the folder to fill. If collective, it must not leave another rank
                waiting when it raises (`shards.save_shards` does not).
            extra: Called on the first rank only, with the same folder: `export.write_assets`.
            before: Called on the first rank first; what it writes is as durable as the checkpoint.
        Returns:
            The new checkpoint.
        Raises:
            StorageError: on every rank, if the disk is full or a file cannot be written.
        """
        final, needed = self.path_of(state.step), 0
        staging = self.folder / f"{_STAGING}{final.name}"
        try:
            needed = self._on_first_rank(lambda: before() or self._open_staging(staging))
            # Before the collective write: a rank that cannot take part must not leave the others inside it.
            self._on_every_rank(lambda: self._require_visible(staging))
            self._on_every_rank(lambda: self._write_files(staging, write_shards, extra), needed)
            names = self._on_first_rank(lambda: list_files(staging))
            shares = all_gather_json(self._on_every_rank(lambda: self._settle(staging, names), needed))
            records = {name: FileRecord(**values) for share in shares for name, values in share.items()}
            self._on_first_rank(lambda: self._commit(staging, final, state, records), needed)
        except Exception:
            if self.ranks.is_first:
                remove_path(staging)
            raise
        self._on_first_rank(lambda: self._apply_limit(self.path_of(state.health.get("best_step", 0))))
        return final

    def path_of(self, step: int) -> Path:
        """Where the checkpoint of a step is, if there is one."""
        return self.folder / f"step-{step:06d}"

    def _open_staging(self, staging: Path) -> int:
        """Make an empty folder to write to; returns how many bytes the checkpoint will need, 0 if that is unknown."""
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_path(staging)
        needed = held_bytes(earlier[-1]) if (earlier := self._by_age()) else 0
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

    def _write_files(
        self, staging: Path, write_shards: Callable[[Path], None], extra: Callable[[Path], None] | None
    ) -> None:
        write_shards(staging)
        write_rng(staging, self.ranks.rank)
        if self.ranks.is_first and extra is not None:
            extra(staging)

    def _settle(self, staging: Path, names: list[str]) -> dict[str, dict[str, Any]]:
        """Sync and hash this rank's share of the files, and make sure that they can be loaded again."""
        records = {}
        for name in names[self.ranks.rank :: self.ranks.world_size]:
            sync(staging / name)
            if name.endswith(".pt"):
                require_harmless(staging / name, name)
            records[name] = asdict(hash_file(staging / name))
        return records

    def _commit(self, staging: Path, final: Path, state: RunState, records: dict[str, FileRecord]) -> None:
        state.write(staging / STATE_FILE)
        sync(staging / STATE_FILE)
        records[STATE_FILE] = hash_file(staging / STATE_FILE)
        newest = self._by_age()[-1:]
        sequence = Manifest.read(newest[0]).sequence + 1 if newest else 0
        Manifest(sequence, records).write(staging)
        sync_folders(staging)
        publish(staging, final)
        replace_text(self.folder / LATEST_FILE, final.name + "\n")

    def _apply_limit(self, best: Path) -> None:
        if self.save_total_limit is None:
            return
        for folder in [old for old in self._by_age()[: -max(1, self.save_total_limit)] if old != best]:
            doomed = folder.with_name(f"{_STAGING}deleted-{folder.name}")
            try:
                # Renamed first: a crash half-way must not leave a folder that looks like a damaged checkpoint.
                os.rename(folder, doomed)
                remove_path(doomed)
            except OSError as error:
                logger.warning("checkpoint.save_total_limit: %s cannot be deleted (%s)", folder, error)

    # ---- find and load

    def find(self, resume: str, look_only: bool = False) -> Path | None:
        """The checkpoint to resume from, verified; None when there is nothing to resume.

        Args:
            resume: `checkpoint.resume`: `never`, `auto` (the newest that verifies) or the path of a checkpoint.
            look_only: Trust the sizes of files, and leave what an interrupted save has left: a run may be saving now.
        Raises:
            CheckpointError: if the named folder is no usable checkpoint, or other processes than these wrote it.
            NoUsableCheckpointError: with `auto`, if checkpoints exist and none verifies.
        """
        if resume == "never":
            return None
        if not look_only:
            self._on_first_rank(self._clean_up)
        folder = self._newest_verified(look_only) if resume == "auto" else self._verified(resume, look_only)
        if folder is not None and (saved := self.load_state(folder).world_size) != self.ranks.world_size:
            raise CheckpointError(
                f"checkpoint.resume={resume}: {folder} was saved by {saved} processes and this run has "
                f"{self.ranks.world_size}; start {saved}, or export it and start a new run from the model"
            )
        return folder

    def load_state(self, folder: Path) -> RunState:
        """The state a checkpoint was saved with."""
        return RunState.read(folder / STATE_FILE)

    def restore_rng(self, folder: Path) -> None:
        """Set this rank's random generators to where they stood when the checkpoint was saved."""
        read_rng(folder, self.ranks.rank)

    def _verified(self, resume: str, look_only: bool) -> Path:
        folder = Path(broadcast_json(str(Path(resume).expanduser().resolve())))
        if (fault := self._fault(folder, look_only)) is None:
            return folder
        meant = checkpoint_meant_by(folder)
        hint = f"did you mean {meant}?" if meant else "name another one, or auto"
        raise CheckpointError(f"checkpoint.resume={resume} cannot be used: {fault}; {hint}")

    def _newest_verified(self, look_only: bool) -> Path | None:
        folders = [Path(path) for path in self._on_first_rank(self._candidates)]
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
        try:
            verify(folder, None if look_only else (self.ranks.rank, self.ranks.world_size))
        except (CheckpointError, OSError) as error:
            fault = str(error)
        return next((theirs for theirs in all_gather_json(fault) if theirs is not None), None)

    def _candidates(self) -> list[str]:
        """Everything that could be a checkpoint, newest first; those without a readable manifest before all others."""
        complete = self._by_age()
        damaged = [folder for folder in self._step_folders() if folder not in complete]
        return [str(folder) for folder in reversed(complete + damaged)]

    def _report_latest(self, folder: Path) -> None:
        latest = self.folder / LATEST_FILE
        named = latest.read_text(encoding="utf-8", errors="replace").strip() if latest.is_file() else None
        if named != folder.name:
            says = "is missing" if named is None else f"names {named!r}" if named else "is empty"
            logger.warning("%s %s; resuming from %s, the newest checkpoint that verifies", latest, says, folder.name)

    # ---- the folder

    def _clean_up(self) -> None:
        """Finish or undo what an interrupted save has left."""
        for path in sorted(self.folder.glob(".*")):
            original = path.with_name(path.name.removeprefix(REPLACED_PREFIX))
            try:
                if path.name.startswith(REPLACED_PREFIX) and not original.exists():
                    os.rename(path, original)
                    logger.warning("%s restored; the save that was to replace it was interrupted", original)
                elif path.name.startswith((_STAGING, REPLACED_PREFIX)):
                    remove_path(path)
                    logger.warning("%s removed; it was left by an interrupted save", path)
            except OSError as error:
                logger.warning("%s was left by an interrupted save and cannot be removed (%s)", path, error)

    def _step_folders(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted(
            (
                path
                for path in self.folder.iterdir()
                if STEP_FOLDER.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
            ),
            key=lambda path: int(path.name.removeprefix("step-")),
        )

    def _by_age(self) -> list[Path]:
        """Folders that hold our manifest, oldest save first."""
        sequences = {}
        for folder in self._step_folders():
            try:
                sequences[folder] = Manifest.read(folder).sequence
            except CheckpointError:
                continue
        return sorted(sequences, key=lambda folder: sequences[folder])

    def _on_first_rank(self, action: Callable[[], Any], needed: int = 0) -> Any:
        """What the action returns on the first rank, as JSON carries it; its error is raised on every rank."""
        return broadcast_json(self._on_every_rank(lambda: action() if self.ranks.is_first else None, needed))

    def _on_every_rank(self, action: Callable[[], T], needed: int = 0) -> T:
        """What the action returns on this rank; if it fails on any rank, every rank raises."""
        result, error = None, None
        try:
            result = action()
        except Exception as failure:  # whatever it is, the other ranks must hear of it
            error = explain_write_error(failure, self.folder, needed)
        raise_together(error)
        return result  # type: ignore[return-value]  # raise_together has raised unless the action returned
