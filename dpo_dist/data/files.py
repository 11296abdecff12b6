"""Rows of a local file, with the line numbers a user can look up.

JSON Lines and Parquet/Arrow are streamed; a JSON array is held as one text while it is read.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_dist.data.arrow_checks import checked_batch
from dpo_dist.data.columns import COLUMNS, HOLDING_TEXT
from dpo_dist.data.compressed import READ_ERRORS, open_bytes, open_seekable, plain_name
from dpo_dist.data.csv_rows import csv_rows
from dpo_dist.data.example import BROKEN_JSON, BROKEN_TEXT, WRONG_TYPE, RowError, RowFault, fault_of
from dpo_dist.data.json_columns import json_decoders
from dpo_dist.data.mapping import ColumnPaths
from dpo_dist.data.meter import Meter
from dpo_dist.data.published import PUBLISHED_COLUMNS
from dpo_dist.errors import DataError

SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow", ".csv")
FORMATS = f"{', '.join(SUFFIXES)}, each plain, .gz or .zst"
ROWS_PER_BATCH = 1024
_LFS_POINTER = b"version https://git-lfs"
_PROMPTS = HOLDING_TEXT - {"chosen", "rejected"}  # with one of these, a row says what its prompt is
_WHITESPACE = re.compile(r"[ \t\r\n]*")
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # of an Arrow stream; pyarrow takes one without it for whole
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_Batch = tuple[pa.RecordBatch, dict[str, None]]
_AS_THEY_ARE = ColumnPaths("columns", {})


def data_suffix(path: PurePath) -> str | None:
    """The suffix that names the format, without .gz or .zst; None if the file is not one we read."""
    suffix = PurePath(plain_name(path)).suffix
    return suffix if suffix in SUFFIXES else None


def read_rows(
    path: Path, shown: str, columns: ColumnPaths = _AS_THEY_ARE, meter: Meter | None = None
) -> Iterator[tuple[int, dict[str, Any] | RowFault]]:
    """(line, row) of every row: the line where it begins, or the row's number in Parquet and Arrow, from 1.

    A row behind which the next one is found all the same is a fault of that row: a line of JSON Lines that is no JSON
    or no UTF-8, an element that is no object. What hides everything behind it is an error.

    Args:
        path: the file; data_suffix(path) is not None.
        shown: its name in messages, as the user wrote it.
        columns: which ones are read under another name; they still have their own in the rows.
        meter: is told how much of the file has been read.
    Raises:
        DataError: where nothing can be read any more, or if the file holds no row.
    """
    suffix = data_suffix(path)
    _require_content(path, shown)
    if suffix == ".parquet":
        rows = _columnar_rows(_parquet_batches(path, shown, columns, meter), shown)
    elif suffix == ".arrow":
        rows = _columnar_rows(_arrow_batches(path, shown, columns, meter), shown)
    elif suffix == ".csv":
        rows = csv_rows(_text_lines(path, shown, meter), shown, columns)
    elif _is_json_array(path, shown):
        rows = _json_array_rows(path, shown, meter)
    else:
        rows = _json_lines_rows(path, shown, meter)
    empty = True
    for line, row in rows:
        empty = False
        if isinstance(row, dict | RowFault):
            yield line, row
        else:
            what = f"the row is of type {type(row).__name__}"
            yield line, RowFault(WRONG_TYPE, f"{shown}:{line}", what, "give a JSON object per row")
    if empty:
        raise DataError(f"{shown}:1: the file has no rows; give at least one preference")


def _require_content(path: Path, shown: str) -> None:
    """A clone without Git LFS holds small texts in the place of its files."""
    try:
        with path.open("rb") as stream:
            begin = stream.read(len(_LFS_POINTER))
    except OSError as error:
        raise _damaged(shown, 1, error) from error
    if begin == _LFS_POINTER:
        raise DataError(f"{shown}:1: the file is a pointer of Git LFS; run `git lfs pull` where it was cloned")


# ---- JSON


def _lines(path: Path, shown: str, meter: Meter | None = None) -> Iterator[tuple[int, bytes]]:
    line = 0
    try:
        with open_bytes(path, meter) as stream:
            for line, raw in enumerate(stream, start=1):
                yield line, raw.removeprefix(_BYTE_ORDER_MARK) if line == 1 else raw
    except READ_ERRORS as error:
        raise _damaged(shown, line + 1, error) from error


def _text_lines(path: Path, shown: str, meter: Meter | None) -> Iterator[tuple[int, str]]:
    return ((line, _decode(raw, shown, line)) for line, raw in _lines(path, shown, meter))


def _is_json_array(path: Path, shown: str) -> bool:
    for _, raw in _lines(path, shown):
        if raw.strip():
            return raw.lstrip().startswith(b"[")
    return False


def _json_lines_rows(path: Path, shown: str, meter: Meter | None) -> Iterator[tuple[int, Any]]:
    for line, raw in _lines(path, shown, meter):
        try:
            # Without its end of line: what is missing at the end would be reported as column 1 of the next.
            if text := _decode(raw, shown, line).rstrip():
                yield line, _json_row(text, shown, line)
        except RowError as error:
            yield line, fault_of(error, f"{shown}:{line}")


def _json_row(text: str, shown: str, line: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _broken_json(shown, line, _problem(error, text, "line")) from None


def _json_array_rows(path: Path, shown: str, meter: Meter | None) -> Iterator[tuple[int, Any]]:
    text = "".join(_decode(raw, shown, line) for line, raw in _lines(path, shown))
    decoder = json.JSONDecoder()
    position, line, counted = _skip_whitespace(text, text.index("[") + 1), 1, 0
    if text[position : position + 1] == "]":
        return
    if meter is not None:
        size = path.stat().st_size
        meter.enter(lambda: size * position / len(text))
    while True:
        line, counted = line + text.count("\n", counted, position), position
        try:
            row, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            at = error.pos if isinstance(error, json.JSONDecodeError) else position
            raise _broken_json(shown, 1 + text.count("\n", 0, at), _problem(error, text, "file")) from None
        yield line, row
        position = _skip_whitespace(text, position)
        separator = text[position : position + 1]
        if separator == "]" and not text[position + 1 :].strip():
            return
        if separator != ",":
            problem = "more text after the array" if separator == "]" else "',' or ']' expected after a row"
            problem += "" if separator else ", and the file ends: cut off?"
            raise _broken_json(shown, 1 + text.count("\n", 0, position), problem)
        position = _skip_whitespace(text, position + 1)


def _skip_whitespace(text: str, position: int) -> int:
    match = _WHITESPACE.match(text, position)
    return match.end() if match else position


def _decode(raw: bytes, shown: str, line: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError(
            f"{shown}:{line}: byte {error.start + 1} of the line is not UTF-8 ({error.reason}); save the file as UTF-8",
            BROKEN_TEXT,
        ) from None


def _problem(error: Exception, text: str, whole: str) -> str:
    """What is wrong and in which column; an error that reaches to the end of the text is one of a missing rest."""
    if not isinstance(error, json.JSONDecodeError):
        return str(error)
    what = f"{error.msg.removesuffix(' at')} at column {error.colno}"
    end = len(text.rstrip())
    if error.pos < end and not error.msg.startswith("Unterminated string"):
        return what
    column = end - text.rfind("\n", 0, end) - 1
    return f"{what}, and the {whole} ends after column {column}: cut off?"


def _broken_json(shown: str, line: int, problem: str) -> RowError:
    return RowError(
        f"{shown}:{line}: broken JSON ({problem}); "
        "give one JSON object per line, or one array of objects for the whole file",
        BROKEN_JSON,
    )


# ---- Parquet and Arrow


def _columnar_rows(batches: Iterator[_Batch], shown: str) -> Iterator[tuple[int, dict[str, Any] | RowFault]]:
    line = 0
    try:
        for batch, unread in batches:
            decoders = json_decoders(batch.schema)
            for values in zip(*batch.columns, strict=True):
                line += 1
                try:
                    row = {name: value.as_py() for name, value in zip(batch.schema.names, values, strict=True)}
                    row |= {name: decode(row[name]) for name, decode in decoders.items()}
                except UnicodeDecodeError as error:
                    what = f"a string is not UTF-8 ({error.reason})"
                    yield line, RowFault(BROKEN_TEXT, f"{shown}:{line}", what, "write the file again")
                    continue
                yield line, row | unread
    except (pa.ArrowException, *READ_ERRORS) as error:
        raise _damaged(shown, line + 1, error) from error


def _parquet_batches(path: Path, shown: str, paths: ColumnPaths, meter: Meter | None) -> Iterator[_Batch]:
    # Parquet is read from its end.
    with open_seekable(path) as stream, pq.ParquetFile(stream) as file:
        columns, unread = _columns(file.schema_arrow, shown, paths)
        num_read, num_rows, size = 0, file.metadata.num_rows, path.stat().st_size
        if meter is not None:
            meter.enter(lambda: size * num_read / num_rows)
        for batch in file.iter_batches(batch_size=ROWS_PER_BATCH, columns=columns):
            yield batch, unread
            num_read += batch.num_rows


def _arrow_batches(path: Path, shown: str, paths: ColumnPaths, meter: Meter | None) -> Iterator[_Batch]:
    """Both forms of the IPC format: files, and the streams that the datasets library writes."""
    size, index = path.stat().st_size, 0
    with open_seekable(path) as stream:
        if stream.read(6) == b"ARROW1":
            reader = pa.ipc.open_file(stream)
            columns, unread = _columns(reader.schema, shown, paths)
            if meter is not None:
                meter.enter(lambda: size * index / reader.num_record_batches)
            for index in range(reader.num_record_batches):
                yield checked_batch(reader.get_batch(index).select(columns)), unread
            return
        stream.seek(max(0, stream.size() - len(_END_OF_STREAM)))
        has_end = stream.read() == _END_OF_STREAM
        stream.seek(0)
        reader = pa.ipc.open_stream(stream)
        if not has_end:
            raise DataError(f"{shown}:1: the stream has no end: cut off? Copy the file again, or write it again")
        columns, unread = _columns(reader.schema, shown, paths)
        if meter is not None:
            meter.enter(lambda: size * stream.tell() / stream.size())
        for batch in reader:
            yield checked_batch(batch.select(columns)), unread


def _columns(schema: pa.Schema, shown: str, paths: ColumnPaths) -> tuple[list[str], dict[str, None]]:
    """The columns to read; and those that mean nothing here: a row names them, as null, so that the user is told."""
    if twice := [name for name in dict.fromkeys(schema.names) if schema.names.count(name) > 1]:
        raise DataError(f"{shown}:1: column {twice[0]} is there {schema.names.count(twice[0])} times; keep one of them")
    try:
        wanted = paths.roots(schema.names)
    except KeyError as error:
        raise DataError(paths.nowhere(error.args[0], f"{shown}:1: ", schema.names)) from None
    known = [name for name in schema.names if name in COLUMNS or name in PUBLISHED_COLUMNS or name in wanted]
    if not wanted and not (HOLDING_TEXT | PUBLISHED_COLUMNS) & set(known):
        raise DataError(
            f"{shown}:1: none of the columns {', '.join(schema.names) or '(none)'} is a preference; "
            "give prompt, chosen, rejected"
        )
    unread = [name for name in schema.names if name not in known]
    if not _PROMPTS & {*known, *paths.paths}:
        # Without a prompt, text that is not read is an error (`unread.py`), so it has to be seen.
        texts = [name for name in unread if _may_be_text(schema.field(name).type)]
        return known + texts, dict.fromkeys(name for name in unread if name not in texts)
    return known, dict.fromkeys(unread)


def _may_be_text(kind: pa.DataType) -> bool:
    plain = (pa.types.is_primitive, pa.types.is_decimal, pa.types.is_null, pa.types.is_binary, pa.types.is_large_binary)
    return not any(is_such(kind) for is_such in plain)


def _damaged(shown: str, line: int, error: BaseException) -> DataError:
    detail = str(error).splitlines()[0] if str(error) else type(error).__name__
    return DataError(f"{shown}:{line}: cannot be read from here on ({detail}); the file is damaged or not of its type")
