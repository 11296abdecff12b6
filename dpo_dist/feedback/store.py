"""A set of feedback: a folder of Parquet files, one for each time that something was added, never changed afterwards.

What is known of a version stands in its own file, so that one rename makes it be there, whole or not at all.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from dpo_dist.data.columns import KEPT_BESIDE
from dpo_dist.durable import sync
from dpo_dist.errors import DataError
from dpo_dist.feedback.events import PROVENANCE, Statement

_METADATA = b"dpo_dist_feedback"
_TEXTS = ("prompt", "chosen", "rejected", "completion", "tools")
_SCHEMA = pa.schema(
    [
        *((name, pa.json_()) for name in _TEXTS),
        ("label", pa.bool_()),
        ("weight", pa.float64()),
        *((f"{KEPT_BESIDE}{name}", pa.string()) for name in ("kind", "source", *PROVENANCE, "key", "opposite")),
    ]
)


@dataclass(frozen=True)
class Version:
    """What one file holds."""

    number: int
    added: str
    """When, in UTC."""
    sources: list[dict[str, Any]]
    """Name, SHA-256 and number of events of each log."""
    kinds: dict[str, int]
    """Rows by kind."""
    num_contradicting: int
    """Rows that contradict another one, of this version or an earlier one."""

    @property
    def num_rows(self) -> int:
        """How many there are."""
        return sum(self.kinds.values())


@dataclass(frozen=True)
class Entry:
    """A statement and where it comes from."""

    statement: Statement
    source: str
    """`path:line`."""
    event: dict[str, Any]


@dataclass(frozen=True)
class Added:
    """What became of the statements that were to be added."""

    version: Version | None
    """None: nothing was new."""
    num_repeated: int
    contradicting: list[str]
    """Where the rows are that contradict another one."""


class FeedbackSet:
    """A folder of versions; it need not be there yet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def versions(self) -> list[Version]:
        """All of them, the oldest first.

        Raises:
            DataError: a file is no version.
        """
        return [_version_of(path) for path in self._files()]

    def add(self, entries: Sequence[Entry], sources: list[dict[str, Any]], weights: dict[str, float]) -> Added:
        """Write what has not been said before as one more version. One process at a time does.

        Args:
            entries: in their order; of equal ones the first counts.
            sources: name, SHA-256 and number of events of each log.
            weights: how much a row counts, by its kind; 1 where none is given.
        Raises:
            DataError: the folder cannot be written, or holds something else.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # what people said is their own affair
            with FileLock(self.folder / ".lock"):
                return self._add(entries, sources, weights)
        except OSError as error:
            raise DataError(
                f"{self.folder}: cannot be written ({error.strerror or error}); make room, or name another folder"
            ) from error

    def _add(self, entries: Sequence[Entry], sources: list[dict[str, Any]], weights: dict[str, float]) -> Added:
        files = self._files()
        said = {key for path in files for key in _keys_of(path)}
        new: list[Entry] = []
        for entry in entries:
            if entry.statement.key not in said:
                said.add(entry.statement.key)
                new.append(entry)
        against = [entry.source for entry in new if entry.statement.opposite in said]
        num_repeated = len(entries) - len(new)
        if not new:
            return Added(None, num_repeated, against)
        number = 1 + max((_version_of(path).number for path in files), default=0)
        kinds = dict(sorted(Counter(entry.statement.kind for entry in new).items()))
        now = datetime.now(UTC).isoformat(timespec="seconds")
        version = Version(number, now, sources, kinds, len(against))
        self._write(version, [_row(entry, weights) for entry in new])
        return Added(version, num_repeated, against)

    def _write(self, version: Version, rows: list[dict[str, Any]]) -> None:
        schema = _SCHEMA.with_metadata({_METADATA: json.dumps(asdict(version)).encode()})
        columns = []
        for field in schema:
            values = [row[field.name] for row in rows]
            is_text = field.name in _TEXTS
            columns.append(pa.array(values, pa.string()).cast(field.type) if is_text else pa.array(values, field.type))
        partial, path = self.folder / ".partial", self.folder / f"train-{version.number:04d}.parquet"
        pq.write_table(pa.Table.from_arrays(columns, schema=schema), partial)
        sync(partial)
        partial.rename(path)
        sync(self.folder)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("train-*.parquet"))


def _row(entry: Entry, weights: dict[str, float]) -> dict[str, Any]:
    statement = entry.statement
    texts = {name: json.dumps(statement.row[name]) if name in statement.row else None for name in _TEXTS}
    known = {name: entry.event.get(name) for name in PROVENANCE}
    weight = weights.get(statement.kind, 1.0) * statement.row.get("weight", 1.0)
    return {
        **texts,
        "label": statement.row.get("label"),
        "weight": weight if weight != 1 else None,
        f"{KEPT_BESIDE}kind": statement.kind,
        f"{KEPT_BESIDE}source": entry.source,
        **{f"{KEPT_BESIDE}{name}": None if value is None else str(value) for name, value in known.items()},
        f"{KEPT_BESIDE}key": statement.key,
        f"{KEPT_BESIDE}opposite": statement.opposite,
    }


def _version_of(path: Path) -> Version:
    try:
        return Version(**json.loads((pq.read_schema(path).metadata or {})[_METADATA]))
    except (OSError, KeyError, ValueError, TypeError, pa.ArrowException) as error:
        raise DataError(f"{path} is no version of a set of feedback; give a folder of its own") from error


def _keys_of(path: Path) -> list[str]:
    _version_of(path)
    return pq.read_table(path, columns=[f"{KEPT_BESIDE}key"]).column(0).to_pylist()
