"""Files that are there after a loss of power."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Block until a file's content, or a folder's list of names, is on the device."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
