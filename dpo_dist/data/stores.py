"""Files of an object store or any other file system that fsspec knows."""

import glob
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, cast

import fsspec
from fsspec.core import url_to_fs
from fsspec.registry import known_implementations

from dpo_dist.config import DataSource
from dpo_dist.data.folders import data_files, files_of_split, no_such_split
from dpo_dist.data.remote_file import Readable, State
from dpo_dist.errors import DataError

# What file systems call that which changes with a file's content; never the time at which it was last read.
_VALIDATORS = (
    "ETag", "etag", "e_tag", "md5Hash", "md5", "crc32c", "content_settings", "blob_id", "oid", "generation",
    "VersionId", "version_id", "LastModified", "last_modified", "updated", "mtime", "modified", "created",
)  # fmt: skip
_SAVED = ("state.json", "dataset_dict.json")


@dataclass(frozen=True)
class StoredFile:
    """One file; `path` is what its file system calls it."""

    files: fsspec.AbstractFileSystem
    path: str
    url: str

    def state(self) -> State:
        """What the file system says of the content now."""
        self.files.invalidate_cache()
        info = self.files.info(self.path)
        size = info.get("size")
        token = {name: str(info[name]) for name in _VALIDATORS if info.get(name) is not None}
        return State({**token, "size": str(size)} if token else {}, size)

    @contextmanager
    def open(self) -> Iterator[Readable]:
        """The content, as it is stored."""
        with self.files.open(self.path, "rb") as stream:
            yield cast(Readable, stream)


def stored_files(source: DataSource, key: str) -> list[StoredFile]:
    """What a URL names: one file, all files of a pattern by their names, or a split of a folder.

    Raises:
        DataError: the protocol is not known, its package is missing, or the folder is none that is read.
        Exception: whatever the file system has for what is not there, may not be read, or cannot be reached.
    """
    files, path = _file_system(source, key)
    files.invalidate_cache()
    try:
        info = files.info(path)
    except FileNotFoundError:
        if not glob.has_magic(path):
            raise
        found = sorted(str(name) for name in files.glob(path) if files.isfile(str(name)))
        if not found:
            raise DataError(f"{key}.path={source.shown} matches no file; correct the pattern") from None
        return [StoredFile(files, name, files.unstrip_protocol(name)) for name in found]
    if info["type"] == "directory":
        return _of_folder(files, path, source, key)
    return [StoredFile(files, path, source.path)]


def _of_folder(files: fsspec.AbstractFileSystem, path: str, source: DataSource, key: str) -> list[StoredFile]:
    names = _names(files, path)
    if any(name.name in _SAVED for name in names):
        raise DataError(
            f"{key}.path={source.shown} was written by save_to_disk, which is read on this machine only; copy the "
            f"folder here, or name its files as a pattern: {source.shown.rstrip('/')}/data-*.arrow"
        )
    found = data_files(names)
    if not any(name.name.startswith(source.split) for name in found) and files.isdir(f"{path.rstrip('/')}/data"):
        found = data_files(_names(files, f"{path.rstrip('/')}/data"))
    chosen = files_of_split(found, source, key)
    if not chosen:
        raise no_such_split(found, source, key)
    return [StoredFile(files, str(name), files.unstrip_protocol(str(name))) for name in chosen]


def _names(files: fsspec.AbstractFileSystem, path: str) -> list[PurePosixPath]:
    return [PurePosixPath(one["name"]) for one in files.ls(path, detail=True) if one["type"] == "file"]


def _file_system(source: DataSource, key: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Where a URL is looked up, and what it is called there."""
    protocol = source.path.partition("://")[0].lower()
    known: dict[str, Any] = known_implementations.get(protocol, {})
    package = str(known.get("class", "")).partition(".")[0]
    try:
        return url_to_fs(source.path)
    except ImportError as error:
        # Of those that fsspec has itself, its message names the package.
        named = package if package and package != "fsspec" else ""
        what = f"the package {named}" if named else f"another package ({error})"
        fix = f"pip install {named} fsspec=={fsspec.__version__}" if named else "install it"
        raise DataError(
            f"{key}.path={source.shown}: {protocol}:// needs {what}; run `{fix}`, or copy the data to this machine"
        ) from error
    except ValueError as error:
        if re.match("Protocol not known", str(error)) is None:
            raise
        raise DataError(
            f"{key}.path={source.shown}: {protocol}:// is no protocol that is known here; use https://, s3://, gs://, "
            "az://, hf:// or another one of fsspec, or a file on this machine"
        ) from None
