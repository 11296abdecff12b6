"""Which files a checkpoint consists of, with sizes and hashes; verification.

A manifest lists every regular file of the folder but itself. It is written last, so that a folder without one is not a
checkpoint, and it is checked before any other file of the folder is opened by anything that interprets it.
"""

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from dpo_dist.checkpoint.pickles import require_harmless
from dpo_dist.checkpoint.state import STATE_FILE, RunState
from dpo_dist.checkpoint.strict_json import parse
from dpo_dist.durable import sync
from dpo_dist.errors import CheckpointError

MANIFEST_FILE = "manifest.json"
LATEST_FILE = "latest"  # beside the checkpoints of a run: the newest one's name
STEP_FOLDER = re.compile(r"step-\d{6,}")
_FORMAT = "dpo_dist checkpoint 1"
_PIECE = 16 << 20  # bytes
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileRecord:
    """What a file must look like."""

    size: int
    """Bytes."""
    sha256: str
    """Lower-case hexadecimal."""


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`."""

    sequence: int
    """Counts the saves of a run folder. The greatest is the newest, also after a run went back to an earlier step."""
    files: dict[str, FileRecord]
    """By path relative to the checkpoint, with forward slashes."""

    @property
    def num_bytes(self) -> int:
        """Size of all files together."""
        return sum(record.size for record in self.files.values())

    def write(self, folder: Path) -> None:
        """Write `manifest.json` and wait until it is on the device."""
        values = {
            "format": _FORMAT,
            "sequence": self.sequence,
            "files": {name: {"size": r.size, "sha256": r.sha256} for name, r in sorted(self.files.items())},
        }
        path = folder / MANIFEST_FILE
        path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        sync(path)

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read `manifest.json` of a folder.

        Raises:
            CheckpointError: if it is missing or broken, or names a path outside of the folder.
        """
        path = folder / MANIFEST_FILE
        if not path.is_file() or path.is_symlink():
            raise CheckpointError(f"{folder} has no {MANIFEST_FILE}; it is not a checkpoint, or was not completed")
        try:
            values = parse(path.read_text(encoding="utf-8"))
            if values["format"] != _FORMAT:
                raise ValueError(f"format is {values['format']!r}, expected {_FORMAT!r}")
            if type(sequence := values["sequence"]) is not int or sequence < 0:
                raise ValueError(f"the sequence {sequence!r} is not a count of saves")
            return cls(sequence, {name: _record(name, r) for name, r in values["files"].items()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{folder}: {MANIFEST_FILE} is damaged ({type(error).__name__}: {error})") from None


def _record(name: str, values: Any) -> FileRecord:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or str(path) != name or name in (".", MANIFEST_FILE) or "\0" in name:
        raise ValueError(f"the path {name!r} does not stay in the folder")
    size, sha256 = values["size"], values["sha256"]
    if type(size) is not int or size < 0 or not _SHA256.fullmatch(sha256):
        raise ValueError(f"the entry of {name!r} has no size or no sha256")
    return FileRecord(size, sha256)


def list_files(folder: Path) -> list[str]:
    """Every file below a folder but the manifest, as sorted relative paths.

    Raises:
        CheckpointError: if something there is neither a regular file nor a folder.
    """
    names = []
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent, name)
            relative = path.relative_to(folder).as_posix()
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise CheckpointError(f"{folder}: {relative} is a link or a special file; a checkpoint has none")
            if path.is_file() and relative != MANIFEST_FILE:
                names.append(relative)
    return sorted(names)


def held_bytes(folder: Path) -> int:
    """Size of all files but the manifest together, as they are: a damaged manifest may say anything."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_FILE)


def hash_file(path: Path) -> FileRecord:
    """Size and SHA-256 of a file, read in pieces.

    Large ones: where training goes on beside it, each piece waits twice until Python's lock is free.
    """
    digest, size, buffer = hashlib.sha256(), 0, memoryview(bytearray(_PIECE))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return FileRecord(size, digest.hexdigest())


def checkpoint_meant_by(path: Path) -> Path | None:
    """The checkpoint somebody means who names the run's folder, its `checkpoints/`, or the file `latest` in there."""
    named = path.parent if path.name == LATEST_FILE else path
    found = (*named.glob("step-*"), *named.glob("checkpoints/step-*"))
    inside = [found for found in found if STEP_FOLDER.fullmatch(found.name) and (found / MANIFEST_FILE).is_file()]
    return max(inside, key=lambda folder: int(folder.name.removeprefix("step-")), default=None)


def verify(folder: Path, share: tuple[int, int] | None = (0, 1)) -> None:
    """Check that a folder is a complete, unchanged checkpoint that can be loaded without executing anything.

    Names, sizes, `state.json` and the manifest are always checked, other hashes and pickles for this share's files.

    Args:
        folder: The checkpoint, `.../step-000012`.
        share: (k, n): this call is the k-th of n that split the reading of files between them. None: none is read.
    Raises:
        CheckpointError: naming the file and its fault.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder" if folder.exists() else f"{folder} does not exist")
    files = Manifest.read(folder).files
    present = list_files(folder)
    for name in sorted(files.keys() - present):
        raise CheckpointError(f"{folder}: {name} is missing; {MANIFEST_FILE} lists it")
    for name in sorted(set(present) - files.keys()):
        raise CheckpointError(f"{folder}: {name} is not listed in {MANIFEST_FILE}; remove it")
    for name, record in files.items():
        size = (folder / name).stat().st_size
        if size != record.size:
            raise CheckpointError(f"{folder}: {name} has {size} bytes, {MANIFEST_FILE} says {record.size}; damaged")
    if STATE_FILE not in files:
        raise CheckpointError(f"{folder}: {MANIFEST_FILE} lists no {STATE_FILE}; not a checkpoint of this program")

    own = sorted(files)[share[0] :: share[1]] if share else []
    for name in sorted({*own, STATE_FILE}):
        if (found := hash_file(folder / name).sha256) != files[name].sha256:
            raise CheckpointError(
                f"{folder}: {name} has sha256 {found[:12]}..., {MANIFEST_FILE} says {files[name].sha256[:12]}...; "
                "it was damaged or changed after it was saved"
            )
        if name.endswith(".pt"):
            require_harmless(folder / name, f"{folder}: {name}")
    RunState.read(folder / STATE_FILE)
