"""Bytes of a file, decompressed as the end of its name says."""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath

import pyarrow as pa

from dpo_dist.data.meter import Meter

COMPRESSIONS = (".gz", ".zst")
# What reading a damaged file raises: a cut gzip ends in EOFError, a flipped bit in zlib.error or an OSError; both are
# an OSError in zstd.
READ_ERRORS = (OSError, EOFError, zlib.error)


def plain_name(path: PurePath) -> str:
    """The name in small letters, without what says how it is compressed."""
    name = path.name.lower()
    return next((name.removesuffix(end) for end in COMPRESSIONS if name.endswith(end)), name)


@contextmanager
def open_bytes(path: Path, meter: Meter | None = None) -> Iterator[io.BufferedIOBase]:
    """The content from its beginning on; a stream that breaks off raises one of `READ_ERRORS`, and never just ends.

    Args:
        path: the file.
        meter: is told how much of it has been read.
    """
    name = path.name.lower()
    with path.open("rb") as stored:
        if meter is not None:
            meter.enter(stored.tell)
        if name.endswith(".gz"):
            with gzip.open(stored, "rb") as stream:
                yield stream
        elif name.endswith(".zst"):
            with io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(stored), "zstd")) as stream:  # pyright: ignore
                yield stream
        else:
            yield stored


def open_seekable(path: Path) -> pa.NativeFile:
    """The content in any order; a compressed file is decompressed as a whole, into memory."""
    if plain_name(path) == path.name.lower():
        return pa.memory_map(str(path))
    with open_bytes(path) as stream:
        return pa.BufferReader(stream.read())
