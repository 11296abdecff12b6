"""The folder of a run: who trains in it, what is written into it first, and whether its model is the finished one."""

import fcntl
import hashlib
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import xxhash

from dpo_dist.checkpoint import explain_write_error, free_bytes, human_bytes, replace_text
from dpo_dist.cli.redaction import redacted_values
from dpo_dist.cli.requirements import LOCK_FILE
from dpo_dist.config import RunConfig, dump_resolved
from dpo_dist.distributed import Ranks, broadcast_json, raising_together
from dpo_dist.errors import ConfigError, FolderInUseError, StorageError
from dpo_dist.metrics import TRACKERS, MetricsFile

_PATIENCE = 70.0  # seconds; NFS remembers for up to a minute that a file was not there
CONFIG_FILE, MODEL_RECORD = "config.yaml", "dpo_dist.json"

logger = logging.getLogger(__name__)


@contextmanager
def locked(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Inside, no other run can train in this folder. Collective: every rank must enter.

    The system frees the lock when the first rank ends, however it ends.

    Raises:
        FolderInUseError: another run does, and which.
        ConfigError: the folder cannot be made, or is another one on another machine.
    """
    descriptor = None
    with raising_together():
        if ranks.is_first:
            descriptor = _take(folder)
    try:
        _require_shared(folder, ranks)
        yield
    finally:
        if descriptor is not None:
            with suppress(OSError):
                (folder / LOCK_FILE).unlink()
                folder.rmdir()  # only if nothing else was written
            os.close(descriptor)


def _require_shared(folder: Path, ranks: Ranks) -> None:
    """All ranks must see the same folder, and not find that out at the first checkpoint."""
    first = broadcast_json([socket.gethostname(), _seen(folder)] if ranks.is_first else None)
    with raising_together():
        patience = time.monotonic() + _PATIENCE
        while (found := _seen(folder)) != first[1] and time.monotonic() < patience:
            time.sleep(0.5)  # a network file system may show an older state for a while
        if found != first[1]:
            raise ConfigError(
                f"train.output_dir={folder} on rank {ranks.rank} ({socket.gethostname()}) is not the folder that the "
                f"first rank has there ({first[0]}); choose one on a file system that all machines share"
            )


def _seen(folder: Path) -> str:
    try:
        return (folder / LOCK_FILE).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        return f"no lock ({type(error).__name__})"


def _take(folder: Path) -> int | None:
    """An open file that holds the lock; None where the file system knows no locks."""
    path = folder / LOCK_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # a model that has seen the data
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(descriptor, 1000).decode(errors="replace") or "a process that has just started"
                os.close(descriptor)
                raise FolderInUseError(
                    f"train.output_dir={folder}: another run trains in this folder ({holder}); wait until it has "
                    "ended, stop it, or choose another folder"
                ) from None
            except OSError as error:
                os.close(descriptor)
                logger.warning("%s: the file system knows no locks (%s); start only one run in it", folder, error)
                return None
            # It may have been removed by its last holder between the two calls.
            if path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino:
                break
            os.close(descriptor)
    except FolderInUseError:
        raise
    except OSError as error:
        raise ConfigError(f"train.output_dir={folder} cannot be written ({error}); choose another folder") from None
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    with suppress(OSError):  # a full disk: the lock holds, and only its text is missing
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}, since {started}".encode())
    return descriptor


@contextmanager
def writing(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Inside, the first rank writes into the run's folder; if that fails, every rank ends. Collective.

    Raises:
        StorageError: the disk is full, or fails.
    """
    with raising_together():
        try:
            yield
        except OSError as error:
            raise explain_write_error(error, folder, 0) from error


def write_config(config: RunConfig) -> None:
    """The resolved configuration, from which the run can be repeated; the old one or the new one, never a part."""
    replace_text(Path(config.train.output_dir) / CONFIG_FILE, dump_resolved(config))


def checkpoint_bytes(num_trained: int, is_float32: bool) -> int:
    """About how much a checkpoint takes, with its optimizer.

    Args:
        num_trained: parameters.
        is_float32: whether the model computes in float32, and its weights are written once only.
    """
    # AdamW's two states and the weights in float32, and the weights themselves where they are half as wide.
    return num_trained * (12 if is_float32 else 14)


def require_space(config: RunConfig, estimate: int) -> None:
    """Look for room for two checkpoints before there is a first one.

    Args:
        config: names the folder, which exists.
        estimate: bytes of one.
    Raises:
        StorageError: not even one fits.
    """
    folder = Path(config.train.output_dir)
    free = free_bytes(folder)
    said = f"a checkpoint takes about {human_bytes(estimate)}, and {human_bytes(free)} are free"
    if free < estimate:
        raise StorageError(f"train.output_dir={folder}: {said}; free some space or choose another folder")
    if free < 2 * estimate and config.checkpoint.save_total_limit != 1:
        logger.warning("%s: %s: a second one does not fit (checkpoint.save_total_limit)", folder, said)


def start_trackers(config: RunConfig, metrics: MetricsFile, first_step: int) -> None:
    """Let trackers follow the metrics.

    Args:
        config: names them.
        metrics: what they get.
        first_step: of the lines of this start.
    Raises:
        ConfigError: one cannot be started.
    """
    folder, values = Path(config.train.output_dir), redacted_values(config.model_dump(mode="json"))
    for section in ("train", "evaluation"):
        for source, given in zip(values["data"][section], getattr(config.data, section), strict=True):
            source["path"] = given.shown
    for name in config.log.report_to:
        try:
            metrics.add_tracker(name, TRACKERS[name](folder, values, first_step))
        except Exception as error:
            raise ConfigError(
                f"log.report_to={name} cannot be started ({type(error).__name__}: {error}); repair that, or leave it "
                "out"
            ) from error


def record_model(model: Path, step: int, checkpoint: str) -> None:
    """Note beside an exported model which step of which checkpoint it is, and the hash of every file."""
    files = {path.name: _fingerprint(path) for path in sorted(model.iterdir()) if path.is_file()}
    files.pop(MODEL_RECORD, None)
    replace_text(
        model / MODEL_RECORD, json.dumps({"step": step, "checkpoint": checkpoint, "files": files}, indent=1) + "\n"
    )


def is_model_of(model: Path, step: int, checkpoint: str, look_only: bool) -> bool:
    """Whether an exported model is that of a checkpoint, with every file as it was written.

    Args:
        model: the folder.
        step: of the run.
        checkpoint: the name of its checkpoint.
        look_only: trust the sizes of files.
    """
    try:
        record: Any = json.loads((model / MODEL_RECORD).read_text(encoding="utf-8"))
        if (record["step"], record["checkpoint"]) != (step, checkpoint) or not record["files"]:
            return False
        return all(
            (model / name).stat().st_size == size and (look_only or _fingerprint(model / name) == [size, digest])
            for name, (size, digest) in record["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _fingerprint(path: Path) -> list[int | str]:
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()]
