"""Files that a user asked for: nothing is replaced unasked, and a name stands for a whole file."""

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from dpo_dist.data import Source
from dpo_dist.errors import ConfigError, DataError


def require_possible(option: str, path: Path, sources: Iterable[Source], overwrite: bool) -> None:
    """Find out that a file cannot be written before the work for it is done.

    Args:
        option: with its value, for messages.
        path: of the file.
        sources: what is read; none of its files is ever replaced.
        overwrite: whether another file may be.
    Raises:
        ConfigError: it cannot be written there, or something is there that nobody said may go.
    """
    if path.resolve() in {one.resolve() for source in sources for one, _ in source.files}:
        raise ConfigError(f"{option} would replace {path}, which is read; give another name")
    if path.exists() and not (overwrite and path.is_file()):
        raise ConfigError(f"{option} would replace {path}; give another name, or --overwrite")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(f"{option}: nothing can be written in {path.parent}; give a folder that is there")


@contextmanager
def written(option: str, *paths: Path) -> Iterator[list[BinaryIO]]:
    """Streams for some files, which get their names when all are on the disk: the last one first.

    Raises:
        DataError: there is no room for them.
    """
    made: list[tuple[BinaryIO, Path, Path]] = []
    try:
        for path in paths:
            descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            os.fchmod(descriptor, 0o666 & ~_umask())
            made.append((os.fdopen(descriptor, "wb"), Path(name), path))
        yield [stream for stream, _, _ in made]
        for stream, _, _ in made:
            stream.flush()
            os.fsync(stream.fileno())
        for _, partial, path in reversed(made):
            partial.replace(path)
    except OSError as error:
        raise DataError(f"{option} cannot be written ({error.strerror or error}); make room") from error
    finally:
        for stream, partial, _ in made:
            stream.close()
            partial.unlink(missing_ok=True)


def _umask() -> int:
    """What other new files are made with: a temporary one is for its owner alone."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
