"""Rows of a CSV file (RFC 4180): the first line names the columns, quoted values may hold line breaks."""

import csv
import json
from collections.abc import Iterator
from typing import Any

from dpo_dist.data.columns import COLUMNS, TEXT_COLUMNS
from dpo_dist.data.example import WRONG_TYPE, RowFault
from dpo_dist.data.mapping import ColumnPaths
from dpo_dist.data.published import PUBLISHED_VALUES
from dpo_dist.errors import DataError

_SAYS = {"role", "from"}  # one of them has every message
csv.field_size_limit(2**31 - 1)  # the library's own is 128 KiB, which a long answer exceeds


def csv_rows(
    lines: Iterator[tuple[int, str]], shown: str, columns: ColumnPaths
) -> Iterator[tuple[int, dict[str, Any] | RowFault]]:
    """(line, row) of every row; the line is where it begins.

    Text stays as it is, unless it is a list of messages as JSON. What is read and is no text is JSON, as numbers are;
    an empty value is null there.

    Args:
        lines: numbered lines with their ends.
        shown: the file's name in messages.
        columns: which ones are read under another name.
    Raises:
        DataError: a quoted value never ends, or a column is named twice.
    """
    read = [0]  # the last line

    def counted() -> Iterator[str]:
        for line, text in lines:
            read[0] = line
            yield text

    reader = csv.reader(counted(), strict=True)
    names: list[str] = []
    kinds: dict[str, bool] = {}
    while True:
        begin = read[0] + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{shown}:{begin}: not CSV ({error}); close the quote, or write the file again") from None
        if not values:
            continue
        if not names:
            names = values
            if twice := [name for name in names if names.count(name) > 1]:
                raise DataError(f"{shown}:{begin}: column {twice[0]} is there more than once; keep one of them")
            kinds = {name: _is_text(name, columns) for name in names}
        elif len(values) != len(names):
            what = f"the row has {len(values)} values for {len(names)} columns"
            yield begin, RowFault(WRONG_TYPE, f"{shown}:{begin}", what, "quote values that hold commas or line breaks")
        else:
            yield begin, {name: _value(text, kinds[name]) for name, text in zip(names, values, strict=True)}


def _is_text(name: str, columns: ColumnPaths) -> bool:
    """Whether a column holds text as it is: nobody else's are read, and of those not all."""
    targets = {target for target, path in columns.paths.items() if name in (path, path.split(".")[0])}
    if targets:
        return targets <= TEXT_COLUMNS and all(columns.paths[target] == name for target in targets)
    return name in TEXT_COLUMNS or name not in {*COLUMNS, *PUBLISHED_VALUES}


def _value(text: str, is_text: bool) -> Any:
    if not text.strip():
        return text if is_text else None
    try:
        # Python writes truth values as True, spreadsheets as TRUE.
        truth = text.strip().lower() in ("true", "false")
        value = json.loads(text.lower() if truth else text) if not is_text or text.lstrip().startswith("[") else text
    except ValueError:
        return text
    return text if is_text and not _are_objects(value) else value


def _are_objects(value: Any) -> bool:
    """Whether a text is messages: an answer may well be a list of something else."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(item, dict) and _SAYS & item.keys() for item in value)
