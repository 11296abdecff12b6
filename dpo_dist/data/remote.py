"""Files on other machines, each copied once into the cache and then read as local ones are.

    <copies>/<hash of the URL and its ETag, time or the like>/<SHA-256 of the content>.jsonl.gz

So what a copy is called says whether it is of what is there now, and whether it is whole. Of any number of processes
one copies, the others wait.
"""

import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO, TypeVar

from dpo_dist.config import DataSource, is_web, shown_url, without_secrets
from dpo_dist.data.files import FORMATS, data_suffix
from dpo_dist.data.remote_file import REFUSED, RemoteFile, State
from dpo_dist.data.stores import stored_files
from dpo_dist.data.web import WebFile
from dpo_dist.durable import locked, sync
from dpo_dist.errors import DataError

_PAUSES_S = (1.0, 2.0, 4.0)  # before the network is tried again
_LOG_EVERY_S = 10.0
_BLOCK = 1 << 20
_LOGGER = logging.getLogger(__name__)
_Result = TypeVar("_Result")


def remote_files(source: DataSource, key: str, copies: Path) -> tuple[tuple[Path, str], ...]:
    """Local copies of the files that a URL names, in order, each with its name in messages.

    Args:
        source: its path is a URL: of a file, and where the file system can list, of a pattern or a folder with a file
            per split.
        key: the entry's place in the configuration, for messages.
        copies: a folder for them; made if missing.
    Raises:
        DataError: there is no such file, it may not be read, cannot be reached or is none that is read; its copy cannot
            be written; it changed while it was copied.
    """
    found = _named(source, key)
    shown = [shown_url(file.url) for file in found]
    for one in shown:
        if data_suffix(_path_of(one)) is None:
            raise DataError(f"{key}.path={one} is not a file of a known type; give one of {FORMATS}")
    return tuple((_copy_of(file, one, key, copies), one) for file, one in zip(found, shown, strict=True))


def _named(source: DataSource, key: str) -> Sequence[RemoteFile]:
    if not is_web(source.path):
        return _patiently(lambda: stored_files(source, key), f"{key}.path={source.shown}")
    if "*" in _path_of(source.shown).name or data_suffix(_path_of(source.shown)) is None:
        raise DataError(
            f"{key}.path={source.shown} is no file of a known type, and a web server lists neither folders nor "
            f"patterns; name each file ({FORMATS})"
        )
    return [WebFile(source.path)]


def _path_of(shown: str) -> PurePosixPath:
    return PurePosixPath(shown.removesuffix("?***"))


def _copy_of(file: RemoteFile, shown: str, key: str, copies: Path) -> Path:
    """The copy of what is there now, made if it is missing."""
    name = f"{key}.path={shown}"
    state = _patiently(file.state, name)
    if not state.token:
        raise DataError(
            f"{name}: the server tells neither ETag nor time of change, so a copy could not be told from an outdated "
            "one; download the file and give its path"
        )
    parts = json.dumps([file.url, dict(sorted(state.token.items()))])
    folder = copies / hashlib.sha256(parts.encode()).hexdigest()[:32]
    path = _path_of(shown)
    suffix = path.name[path.name.lower().rindex(str(data_suffix(path))) :].lower()
    try:
        if (found := _whole(folder, suffix)) is not None:
            return found
        copies.mkdir(parents=True, exist_ok=True, mode=0o700)
        with locked(folder, "copies the same file"):
            return _whole(folder, suffix) or _copied(file, state, name, folder, suffix)
    except OSError as error:
        raise DataError(
            f"{name}: its copy in {copies} cannot be written or read ({error.strerror or error}); make room, or choose "
            "another folder for the cache"
        ) from error


def _whole(folder: Path, suffix: str) -> Path | None:
    """The copy, if there is one with the content that its name says."""
    for path in folder.glob(f"*{suffix}"):
        with path.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() == path.name.removesuffix(suffix):
                return path
        _LOGGER.warning("%s is damaged and is copied again", path)
    return None


def _copied(file: RemoteFile, state: State, name: str, folder: Path, suffix: str) -> Path:
    """Copy under a temporary name, bring it to the disk, give it its name. Needs the lock."""
    folder.mkdir(exist_ok=True, mode=0o700)
    for leftover in folder.iterdir():
        leftover.unlink()
    size = f" ({state.size:,} bytes)" if state.size is not None else ""
    _LOGGER.info("%s is copied into %s%s", name, folder, size)
    descriptor, partial_name = tempfile.mkstemp(prefix=".partial-", dir=folder)
    partial = Path(partial_name)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            digest = _patiently(lambda: _fetch(file, state, name, stream), name)
            _patiently(lambda: _require_same(file, state, name), name)
            stream.flush()
            os.fsync(stream.fileno())
        path = folder / f"{digest}{suffix}"
        partial.rename(path)
        sync(folder)
        sync(folder.parent)
        return path
    finally:
        partial.unlink(missing_ok=True)


class _WriteError(Exception):
    """The disk is to blame, and not the network."""


def _fetch(file: RemoteFile, state: State, name: str, target: BinaryIO) -> str:
    """Write the whole content; returns its SHA-256.

    Raises:
        DataError: it is another size, and no longer what it was.
        ConnectionError: not all of it came.
    """
    digest, size, next_log_s = hashlib.sha256(), 0, time.monotonic() + _LOG_EVERY_S
    _written(lambda: (target.seek(0), target.truncate()))
    with file.open() as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
            size += len(block)
            _written(lambda block=block: target.write(block))
            if time.monotonic() >= next_log_s:
                next_log_s += _LOG_EVERY_S
                _LOGGER.info("%s: %s bytes copied", name, f"{size:,}")
    if state.size is not None and size != state.size:
        _require_same(file, state, name)
        raise ConnectionError(f"{size:,} of {state.size:,} bytes came")
    return digest.hexdigest()


def _require_same(file: RemoteFile, state: State, name: str) -> None:
    if file.state() != state:
        raise DataError(f"{name} changed while it was copied; wait until it is complete, and start again")


def _written(write: Callable[[], object]) -> None:
    try:
        write()
    except OSError as error:
        raise _WriteError from error


def _patiently(ask: Callable[[], _Result], name: str) -> _Result:
    """What `ask` gives, asked a few times where the network may be at fault.

    Raises:
        DataError: it cannot be had.
        OSError: of this machine's disk.
    """
    for pause_s in (*_PAUSES_S, None):
        try:
            return ask()
        except DataError:
            raise
        except _WriteError as error:
            assert isinstance(error.__cause__, OSError)
            raise error.__cause__ from None
        # File systems raise anything from ConnectionError to what the library of their protocol has.
        except Exception as error:
            detail = without_secrets(f"{type(error).__name__}: {error}".splitlines()[0])
            if pause_s is None or isinstance(error, REFUSED):
                raise _unreachable(error, detail, name) from error
            _LOGGER.warning("%s: %s; it is tried again in %d s", name, detail, pause_s)
        time.sleep(pause_s)
    raise AssertionError("the last attempt returns or raises")


def _unreachable(error: Exception, detail: str, name: str) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"{name} is not there ({detail}); correct the path")
    if isinstance(error, PermissionError):
        return DataError(
            f"{name} may not be read ({detail}); give this process access (docs/data.md), or download the file and "
            "give its path"
        )
    return DataError(
        f"{name} cannot be read ({detail}); check address, network and credentials (docs/data.md), or download the "
        "file and give its path"
    )
