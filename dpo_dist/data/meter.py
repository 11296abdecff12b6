"""How far the reading of a data set has come."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Meter:
    """Of the reading that began last. What is not known is left out."""

    num_bytes: int = 0
    """Of all files, as they are stored."""
    most_rows: int | None = None
    """There are no more, or no more are used."""
    num_rows: int = 0
    """Read so far."""
    _bytes_before: int = 0
    _part: Callable[[], float] | None = None

    def begin(self, num_bytes: int, most_rows: int | None) -> None:
        """Nothing has been read yet."""
        self.num_bytes, self.most_rows = num_bytes, most_rows
        self.num_rows = self._bytes_before = 0
        self._part = None

    def enter(self, num_bytes_read: Callable[[], float]) -> None:
        """A file is opened, which tells when asked how many of its bytes have been read."""
        self._part = num_bytes_read

    def leave(self, num_bytes: int) -> None:
        """A file of so many bytes is read."""
        self._bytes_before += num_bytes
        self._part = None

    @property
    def share(self) -> float | None:
        """Of the bytes or rows that are to be read, between 0 and 1."""
        shares = []
        if self.most_rows:
            shares.append(self.num_rows / self.most_rows)
        if self.num_bytes:
            shares.append((self._bytes_before + self._bytes_of_part()) / self.num_bytes)
        return min(1.0, max(shares)) if shares else None

    def _bytes_of_part(self) -> float:
        try:
            return float(self._part()) if self._part is not None else 0.0
        except ValueError:  # closed: no more of it is used
            return 0.0
