"""One entry of data.train or data.evaluation: a file, a folder of splits, or a hub data set."""

import glob
import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from dpo_dist.config import DataSource, Pairing, is_url
from dpo_dist.data.columns import COLUMNS, HOLDING_TEXT, Row, holds_token_ids, ignored_columns
from dpo_dist.data.example import (
    BROKEN_JSON,
    BROKEN_TEXT,
    MIXED_KINDS,
    PreferenceExample,
    RowError,
    RowFault,
    fault_of,
)
from dpo_dist.data.files import FORMATS, data_suffix, read_rows
from dpo_dist.data.folders import split_files
from dpo_dist.data.held_out import Part
from dpo_dist.data.mapping import ColumnPaths
from dpo_dist.data.meter import Meter
from dpo_dist.data.published import as_ranking
from dpo_dist.data.rows import parse_row
from dpo_dist.data.values import without_nulls
from dpo_dist.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
else:
    Dataset = Any  # a run on local files does not import the library

# `name` or `owner/name`, as the hub allows them: anything else can only be a local path.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Source:
    """An opened entry: rows can be read any number of times, always in the same order."""

    key: str
    """The entry's place in the configuration, such as `data.train.0`."""
    name: str
    """Its path, for messages."""
    limit: int | None
    columns: ColumnPaths
    fraction: float = 1.0
    files: tuple[tuple[Path, str], ...] = ()
    """Local files, or copies of what is on other machines, in order; each with its name in messages."""
    hub_dataset: Dataset | None = None
    part: Part = "whole"
    held_out_share: float = 0.0
    meter: Meter = field(default_factory=Meter, compare=False, repr=False)
    """How far `rows` and the like have come."""

    def identity(self) -> list[str]:
        """What the rows depend on: names and SHA-256 of all files, or the hub data set's fingerprint.

        Names count because they are stored with every row, for messages.
        """
        # What most sources do not have is left out, so that their data are found again.
        more = [json.dumps(self.columns.paths, sort_keys=True)] if self.columns.paths else []
        more += [f"fraction {self.fraction!r}"] if self.fraction < 1 else []
        more += [f"{self.part} by ids {self.held_out_share!r}"] if self.part != "whole" else []
        if self.hub_dataset is not None:
            return [self.name, self.hub_dataset._fingerprint, str(self.limit), *more]
        parts = [part for path, shown in self.files for part in (shown, _digest(path, shown))]
        return [*parts, str(self.limit), *more]

    def holds_token_ids(self) -> bool:
        """Whether the rows are already tokenised; the first row with a prompt or completion tells."""
        kinds = (_is_tokenised(row) for _, row in self._used_rows())
        return next((kind for kind in kinds if kind is not None), False)

    def examples(
        self, ignored: set[str] | None = None, pairing: Pairing = "all", demonstrations: bool = False
    ) -> Iterator[PreferenceExample | RowFault]:
        """Every row up to the limit, as an example or as the reason why it is none.

        Args:
            ignored: gets the names of the columns that mean nothing here, as they are met.
            pairing, demonstrations: see `parse_row`.
        Raises:
            DataError: at a fault of the file that hides the rows behind it, naming file:line.
        """
        for where, row in self.rows():
            yield row if isinstance(row, RowFault) else example_of(row, where, ignored, pairing, demonstrations)

    def rows(self) -> Iterator[tuple[str, Row | RowFault]]:
        """Every row up to the limit, of whatever part, with its place; raises as `examples`."""
        tokenised: bool | None = None
        for where, row in self._used_rows():
            kind = _is_tokenised(row)
            tokenised = kind if tokenised is None else tokenised
            if kind is not None and kind != tokenised:
                kinds = ("text", "token ids") if tokenised else ("token ids", "text")
                what = f"the row holds {kinds[0]}, earlier rows hold {kinds[1]}"
                yield where, RowFault(MIXED_KINDS, where, what, "use one kind per source")
            else:
                yield where, row

    def raw_rows(self) -> Iterator[tuple[str, Row | RowFault]]:
        """The row of every item of `examples` of the whole, as it stands in the file, with its `path:line`."""
        for number, found in enumerate(islice(self._file_rows(), self.limit)):
            self.meter.num_rows = number + 1
            # Evenly spread, so that no order of the rows matters.
            if math.floor((number + 1) * self.fraction) > math.floor(number * self.fraction):
                yield found

    def _used_rows(self) -> Iterator[tuple[str, Row | RowFault]]:
        """Those that `limit` and `fraction` leave, under the names that we know."""
        for where, row in self.raw_rows():
            yield where, row if isinstance(row, RowFault) else _checked_row(row, self.columns, where)

    def _file_rows(self) -> Iterator[tuple[str, Row | RowFault]]:
        most_rows, sizes = self.limit, [_size(path) for path, _ in self.files]
        if self.hub_dataset is not None:
            most_rows = min(len(self.hub_dataset), self.limit or len(self.hub_dataset))
        self.meter.begin(sum(sizes), most_rows)
        if self.hub_dataset is not None:
            for number, row in enumerate(self.hub_dataset, start=1):
                yield f"{self.name}:{number}", dict[str, Any](row)
            return
        for (path, shown), size in zip(self.files, sizes, strict=True):
            for line, row in read_rows(path, shown, self.columns, self.meter):
                yield f"{shown}:{line}", row
            self.meter.leave(size)


def example_of(
    row: Row, where: str, ignored: set[str] | None, pairing: Pairing, demonstrations: bool
) -> PreferenceExample | RowFault:
    """One row of `Source.rows`; the arguments are those of `Source.examples`."""
    if ignored is not None:
        ignored |= ignored_columns(row, demonstrations)
    try:
        return parse_row(row, where, pairing, demonstrations)
    except RowError as error:
        return fault_of(error, where)


def _checked_row(row: Row, columns: ColumnPaths, where: str) -> Row | RowFault:
    """The row with the columns that we know, and without nulls inside of them; or that it cannot be read."""
    try:
        for name in row:
            name.encode("utf-8")
        row = as_ranking(columns.renamed(row, where), where)
        return {name: without_nulls(value) if name in COLUMNS else value for name, value in row.items()}
    except UnicodeEncodeError as error:
        what = f"the name of a column holds half of a surrogate pair ({error.object!a})"
        return RowFault(BROKEN_TEXT, where, what, "write the character as UTF-8 or as a complete \\uXXXX\\uXXXX pair")
    except RowError as error:
        return fault_of(error, where)
    except RecursionError:
        return RowFault(BROKEN_JSON, where, "values are nested too deep", "repair the row")


def _is_tokenised(row: Row | RowFault) -> bool | None:
    """Whether a row holds token ids or text; None where it holds neither."""
    if isinstance(row, RowFault) or all(row.get(column) is None for column in HOLDING_TEXT):
        return None
    return holds_token_ids(row)


def open_source(
    source: DataSource, key: str, part: Part = "whole", held_out_share: float = 0.0, cache_dir: Path | None = None
) -> Source:
    """Find the files or the hub data set that an entry names.

    Args:
        source: path, split and limit.
        key: the entry's place in the configuration, for messages.
        part: its prompts that are trained on, those that are held out, or all.
        held_out_share: how many are held out.
        cache_dir: where tokenised data are kept, and copies of what is on other machines; a URL needs it.
    Raises:
        DataError: if there is nothing to read; says what was looked for.
    """
    path = Path(source.path).expanduser()
    columns = ColumnPaths(f"{key}.columns", source.columns, frozenset(COLUMNS))
    if unknown := [name for name in source.columns if name not in COLUMNS]:
        raise DataError(
            f"{key}.columns.{unknown[0]} is not a column that is read; give the column's path under one of "
            f"{', '.join(COLUMNS)}"
        )
    rest = (source.limit, columns, source.fraction)
    if is_url(source.path):
        return Source(key, source.shown, *rest, _remote(source, key, cache_dir), None, part, held_out_share)
    if path.exists() or glob.has_magic(source.path):
        _refuse_hub_keys(source, key)
        if path.is_dir():
            files = split_files(path, source, key)
        else:
            found = [(path, source.path)] if path.exists() else _matching(source, key)
            files = tuple(_single_file(*one, source, key) for one in found)
        return Source(key, source.path, *rest, files, part=part, held_out_share=held_out_share)
    is_hub_id = _HUB_ID.fullmatch(source.path) and data_suffix(path) is None
    if not is_hub_id:
        raise DataError(
            f"{key}.path={source.path} does not exist (looked for {path.absolute()}); "
            f"give a file ({FORMATS}), a folder of such files named by split, or a hub id such as owner/name"
        )
    from dpo_dist.data.hub import load_split  # noqa: PLC0415  (the library behind it takes a second to import)

    shown = f"{source.path}[{source.split}]" if source.name is None else f"{source.path}/{source.name}[{source.split}]"
    return Source(key, shown, *rest, (), load_split(source, key), part, held_out_share)


def _refuse_hub_keys(source: DataSource, key: str) -> None:
    for name in ("name", "revision"):
        if (value := getattr(source, name)) is not None:
            what = "a URL" if is_url(source.path) else "on this machine"
            raise DataError(f"{key}.{name}={value} belongs to a hub id, and {source.shown} is {what}; leave it out")


def _remote(source: DataSource, key: str, cache_dir: Path | None) -> tuple[tuple[Path, str], ...]:
    """Copies of what a URL names."""
    from dpo_dist.data.remote import remote_files  # noqa: PLC0415  (a run on local files does not import fsspec)

    _refuse_hub_keys(source, key)
    if data_suffix(PurePosixPath(source.shown.removesuffix("?***"))) is not None:
        _refuse_split(source, key, source.shown)
    if cache_dir is None:
        raise ValueError("a URL is read from a copy, which needs a folder")
    return remote_files(source, key, cache_dir / "copies")


def _matching(source: DataSource, key: str) -> list[tuple[Path, str]]:
    """The files of a pattern, in the order of their names."""
    names = sorted(glob.glob(str(Path(source.path).expanduser()), recursive=True))
    found = [(Path(name), name) for name in names if Path(name).is_file()]
    if not found:
        raise DataError(f"{key}.path={source.path} matches no file (looked from {Path.cwd()}); correct the pattern")
    return found


def _single_file(path: Path, shown: str, source: DataSource, key: str) -> tuple[Path, str]:
    if data_suffix(path) is None:
        raise DataError(f"{key}.path={shown} is not a file of a known type; give one of {FORMATS}")
    _refuse_split(source, key, shown)
    return path, shown


def _refuse_split(source: DataSource, key: str, shown: str) -> None:
    if source.split != "train":
        raise DataError(
            f"{key}.split={source.split} has no effect on the single file {shown}; "
            "leave split out, or give a folder with a file per split"
        )


def _size(path: Path) -> int:
    """In bytes; what is not there is told when it is read."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _digest(path: Path, shown: str) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(
            f"{shown}:1: cannot be read ({error.strerror or error}); check the file's permissions"
        ) from error
