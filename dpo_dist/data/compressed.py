"""Bytes of a file, decompressed as the end of its name says."""

import gzip
import io
import zlib
from pathlib import Path, PurePath

import pyarrow as pa

COMPRESSIONS = (".gz", ".zst")
# What reading a damaged file raises: a cut gzip ends in EOFError, a flipped bit in zlib.error or an OSError; both are
# an OSError in zstd.
READ_ERRORS = (OSError, EOFError, zlib.error)


def plain_name(path: PurePath) -> str:
    """The name in small letters, without what says how it is compressed."""
    name = path.name.lower()
    return next((name.removesuffix(end) for end in COMPRESSIONS if name.endswith(end)), name)


def open_bytes(path: Path) -> io.BufferedIOBase:
    """The content from its beginning on; a stream that breaks off raises one of `READ_ERRORS`, and never just ends."""
    name = path.name.lower()
    if name.endswith(".gz"):
        return gzip.open(path, "rb")
    if name.endswith(".zst"):
        return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))  # pyright: ignore
    return path.open("rb")


def open_seekable(path: Path) -> pa.NativeFile:
    """The content in any order; a compressed file is decompressed as a whole, into memory."""
    if plain_name(path) == path.name.lower():
        return pa.memory_map(str(path))
    with open_bytes(path) as stream:
        return pa.BufferReader(stream.read())
