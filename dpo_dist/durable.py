"""Files that are there after a loss of power, and are written by one process alone."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

_LOG_EVERY_S = 10.0
_LOGGER = logging.getLogger(__name__)


def sync(path: Path) -> None:
    """Block until a file's content, or a folder's list of names, is on the device."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(target: Path, doing: str) -> Iterator[None]:
    """Hold the lock of a file or folder, which stands beside it; the system frees it if its holder dies.

    Args:
        target: need not exist; its parent does.
        doing: what another process does that is waited for, such as "tokenises the same data".
    """
    lock = FileLock(target.with_name(f"{target.name}.lock"))
    while True:
        try:
            lock.acquire(timeout=_LOG_EVERY_S)
            break
        except Timeout:
            _LOGGER.info("waiting for another process that %s (%s)", doing, lock.lock_file)
    try:
        yield
    finally:
        lock.release()
