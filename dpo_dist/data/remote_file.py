"""What can be asked of a file on another machine, however it is reached."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

# Asking again gives the same: everything else may be the network's.
REFUSED = (
    FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError, ValueError,
    TypeError, ImportError,
)  # fmt: skip


@dataclass(frozen=True)
class State:
    """What a content is known by."""

    token: Mapping[str, str]
    """ETag, time of change and the like; equal as long as the content is. Empty where nothing of it is told."""
    size: int | None
    """In bytes."""


@runtime_checkable
class Readable(Protocol):
    """A stream."""

    def read(self, size: int, /) -> bytes:
        """Up to so many bytes; none at the end."""
        ...


@runtime_checkable
class RemoteFile(Protocol):
    """One file."""

    @property
    def url(self) -> str:
        """Its whole address, with what may be secret in it."""
        ...

    def state(self) -> State:
        """What its content is known by now, asked anew."""
        ...

    def open(self) -> AbstractContextManager[Readable]:
        """Its content from the beginning on."""
        ...
