"""The folders of `checkpoints/`: which there are, in which order, and which go."""

import logging
import os
from pathlib import Path

from dpo_dist.checkpoint.files import REPLACED_PREFIX, remove_path
from dpo_dist.checkpoint.manifest import STEP_FOLDER, Manifest
from dpo_dist.errors import CheckpointError

logger = logging.getLogger(__name__)

STAGING_PREFIX = ".tmp-"


def step_folders(folder: Path) -> list[Path]:
    """Folders with the name of a checkpoint, by step."""
    if not folder.is_dir():
        return []
    return sorted(
        (
            path
            for path in folder.iterdir()
            if STEP_FOLDER.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
        ),
        key=lambda path: int(path.name.removeprefix("step-")),
    )


def by_age(folder: Path) -> list[Path]:
    """Folders that hold our manifest, oldest save first."""
    sequences = {}
    for path in step_folders(folder):
        try:
            sequences[path] = Manifest.read(path).sequence
        except CheckpointError:
            continue
    return sorted(sequences, key=lambda path: sequences[path])


def candidates(folder: Path) -> list[Path]:
    """Everything that could be a checkpoint, newest first; those without a readable manifest before all others."""
    complete = by_age(folder)
    damaged = [path for path in step_folders(folder) if path not in complete]
    return list(reversed(complete + damaged))


def apply_limit(folder: Path, save_total_limit: int | None, best: Path) -> None:
    """Delete all but the newest ones, and the best one."""
    if save_total_limit is None:
        return
    for path in [old for old in by_age(folder)[: -max(1, save_total_limit)] if old != best]:
        doomed = path.with_name(f"{STAGING_PREFIX}deleted-{path.name}")
        try:
            # Renamed first: a crash half-way must not leave a folder that looks like a damaged checkpoint.
            os.rename(path, doomed)
            remove_path(doomed)
        except OSError as error:
            logger.warning("checkpoint.save_total_limit: %s cannot be deleted (%s)", path, error)


def clean_up(folder: Path) -> None:
    """Finish or undo what an interrupted save has left."""
    for path in sorted(folder.glob(".*")):
        original = path.with_name(path.name.removeprefix(REPLACED_PREFIX))
        try:
            if path.name.startswith(REPLACED_PREFIX) and not original.exists():
                os.rename(path, original)
                logger.warning("%s restored; the save that was to replace it was interrupted", original)
            elif path.name.startswith((STAGING_PREFIX, REPLACED_PREFIX)):
                remove_path(path)
                logger.warning("%s removed; it was left by an interrupted save", path)
        except OSError as error:
            logger.warning("%s was left by an interrupted save and cannot be removed (%s)", path, error)
