"""How far tokenising has come, written down now and then, so that a process that was killed is gone on from.

    .<name>.<random>/examples.arrow   what is written
    .<name>.<random>/journal.json     of how many rows, and what is told of them

What was written is believed only where its hash is the one that the journal names, so that nothing has to be brought to
the disk for it, and what comes out is the same file as without an interruption.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

EVERY_S = 10.0
_FILE = "journal.json"


class Journal:
    """Writes down how far a folder has come."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / _FILE
        self._next_s = time.monotonic() + EVERY_S

    @property
    def is_due(self) -> bool:
        """Whether it is time to write."""
        return time.monotonic() >= self._next_s

    def write(self, state: dict[str, Any]) -> None:
        """Put JSON values in the place of those before."""
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(state), encoding="utf-8")
        os.replace(partial, self._path)
        self._next_s = time.monotonic() + EVERY_S

    def remove(self) -> None:
        """Nothing is to be gone on from any more."""
        self._path.unlink(missing_ok=True)


@contextmanager
def partial_folders(folder: Path) -> Iterator[tuple[Path, Path | None, dict[str, Any]]]:
    """A new folder to write in; and that of a process that was killed, with its journal, if there is such a one.

    Of several the one that has come furthest. It stays until the new folder has a journal of its own, or its name.
    Needs the lock.
    """
    found = [(one, _state_of(one)) for one in sorted(folder.parent.glob(f".{folder.name}.*"))]
    known = [(one, state) for one, state in found if state is not None]
    earlier, state = max(known, key=lambda one: one[1].get("num_examples", 0), default=(None, {}))
    for leftover, _ in found:
        if leftover != earlier:
            shutil.rmtree(leftover)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    is_done = False
    try:
        yield partial, earlier, state
        is_done = True
    except BaseException as error:
        # Who is asked to end leaves what there is for a later start; what cannot be used is of no use then either.
        if isinstance(error, Exception) or _state_of(partial) is None:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        if earlier is not None and (is_done or _state_of(partial) is not None):
            shutil.rmtree(earlier, ignore_errors=True)


def _state_of(folder: Path) -> dict[str, Any] | None:
    try:
        state = json.loads((folder / _FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) else None
