"""Durable writes: fsync, atomic replace, and what a full disk looks like from Python.

Knows nothing of checkpoints. A rename is durable only after its parent folder was synced, and a file only after it was
synced itself: a machine that loses power right after `os.replace` may otherwise keep the new name and lose the content.
"""

import errno
import fcntl
import os
import shutil
import stat
from pathlib import Path

from dpo_dist.durable import sync
from dpo_dist.errors import CheckpointError, ConfigError, FolderInUseError, StorageError

REPLACED_PREFIX = ".replaced-"
# No room on the device, the user's quota, or a file larger than the process may write.
_FULL_DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# torch's archive writer reports a short write as a wrong position or a failed stream, safetensors in its text only.
_FULL_DISK_TEXTS = (
    "unexpected pos",
    "PytorchStreamWriter failed",
    "iostream error",
    "No space left",
    "File too large",
    "quota exceeded",
)


def sync_folders(root: Path) -> None:
    """Sync a folder and every folder below it, deepest first."""
    for folder, _, _ in os.walk(root, topdown=False):
        sync(Path(folder))


def replace_text(path: Path, text: str) -> None:
    """Write a small file so that a reader sees either the old content or the new one, also after a crash."""
    staging = path.with_name(f".tmp-{path.name}")
    staging.unlink(missing_ok=True)  # made anew: a link of that name is not followed
    with staging.open("x", encoding="utf-8") as file:
        file.write(text)
    sync(staging)
    os.replace(staging, path)
    sync(path.parent)


def remove_path(path: Path) -> None:
    """Delete a file, or a folder with its content, if it is there; a symbolic link is removed, never followed."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def claim_staging(out: Path) -> tuple[Path, int | None]:
    """An empty folder beside `out`, to be given its name when it is complete. Nobody else fills or reads it meanwhile.

    Returns:
        The folder, and a descriptor that holds it until it is closed, by the system at the latest when the process
        ends; None where the file system knows no locks.
    Raises:
        FolderInUseError: another process fills it.
        ConfigError: it cannot be made there.
        StorageError: the disk is full.
    """
    staging = out.parent / f".tmp-{out.name}"
    while True:
        _make_staging(staging, out)
        try:
            held = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:  # its last holder has just published it
            continue
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(held)
            raise FolderInUseError(
                f"{out} is being written by another process; wait until it has ended, or name another folder"
            ) from None
        except OSError:
            os.close(held)
            held = None
        if held is None or (staging.is_dir() and os.fstat(held).st_ino == staging.stat().st_ino):
            break
        os.close(held)
    for left in staging.iterdir():  # by a process that was killed
        remove_path(left)
    return staging, held


def _make_staging(staging: Path, out: Path) -> None:
    try:
        if staging.is_symlink() or staging.is_file():
            staging.unlink()
        staging.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir(mode=0o700, exist_ok=True)
        if out.is_dir():  # one that is replaced keeps its mode
            staging.chmod(stat.S_IMODE(out.stat().st_mode))
    except OSError as error:
        if is_disk_full(error):
            raise explain_write_error(error, out.parent, 0) from error
        raise ConfigError(f"{out} cannot be made ({error}); name another folder") from None


def publish(staging: Path, final: Path) -> None:
    """Give a finished folder its name; one that has the name already stays until its successor is in place."""
    replaced = final.with_name(f"{REPLACED_PREFIX}{final.name}")
    remove_path(replaced)
    if final.exists() or final.is_symlink():
        os.rename(final, replaced)
    os.rename(staging, final)
    sync(final.parent)
    remove_path(replaced)


def free_bytes(folder: Path) -> int:
    """Bytes an ordinary user may still write on the file system of a folder that exists."""
    return shutil.disk_usage(folder).free


def human_bytes(count: int) -> str:
    """A number of bytes for a message: `1.5 GiB`."""
    size = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{count} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, says that the disk, the quota or the file size limit is exhausted."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL_DISK_ERRNOS:
            return True
        if any(text in str(error) for text in _FULL_DISK_TEXTS):
            return True
        error = error.__cause__ or error.__context__
    return False


def explain_write_error(error: Exception, folder: Path, needed: int) -> Exception:
    """The error a user can act on, for one that a failed write raised.

    Args:
        error: What the write raised.
        folder: Where it was writing.
        needed: Bytes that are known to be needed; 0 if nothing is known.
    Returns:
        A StorageError when the disk or the file system is at fault, else the error as it is.
    """
    if isinstance(error, CheckpointError):
        return error
    if is_disk_full(error):
        need = human_bytes(needed) if needed else "more than was left"
        have = human_bytes(free_bytes(folder)) if folder.is_dir() else "unknown"
        return StorageError(
            f"{folder}: disk full: need {need}, have {have}; nothing older was lost; "
            f"free some space or lower checkpoint.save_total_limit ({error})"
        )
    if isinstance(error, OSError):
        return StorageError(f"{folder} cannot be written; nothing older was lost; check the disk ({error})")
    return error
