"""Columns that a file calls by other names: `columns` of a data source.

A path leads to the value: the name of a column, and behind dots names of fields, numbers of items, or `*` for each item
of a list. A column whose own name has dots in it is found as well.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dpo_dist.data.example import MISSING_COLUMN, WRONG_TYPE, RowError

EACH = "*"


@dataclass(frozen=True)
class ColumnPaths:
    """Where the columns of a source are."""

    key: str
    """The setting's place in the configuration, such as `data.train.0.columns`."""
    paths: Mapping[str, str]
    """Paths by the names that they are read under; empty: each column under its own name."""
    kept: frozenset[str] = frozenset()
    """Columns that are read under their own names as well, where a path only leads into them."""

    def roots(self, names: Iterable[str]) -> set[str]:
        """Those of a file's columns in which the paths begin.

        Raises:
            KeyError: a path begins in none of them; the argument is the name that it is read under.
        """
        there = set(names)
        return {_root(path, there, name) for name, path in self.paths.items()}

    def renamed(self, row: dict[str, Any], source: str) -> dict[str, Any]:
        """The row with the columns under the names that they are read under; the others stay.

        Raises:
            RowError: a path leads nowhere in this row.
        """
        if not self.paths:
            return row
        try:
            roots = self.roots(row)
        except KeyError as error:
            raise RowError(self.nowhere(error.args[0], f"{source}: ", row), MISSING_COLUMN) from None
        found = {name: self._value(name, row, source) for name in self.paths}
        # A column of which only a part is read elsewhere may be one of its own.
        gone = {root for root in roots if root in self.paths.values() or root not in self.kept}
        return {**{name: value for name, value in row.items() if name not in gone}, **found}

    def nowhere(self, name: str, place: str, names: Iterable[str]) -> str:
        """What is wrong with the path of a column, of which a file or row has other names."""
        path = self.paths[name]
        return (
            f"{place}no column {path} ({self.key}.{name}={path}); the columns are {', '.join(names) or 'none'}: "
            "correct the path"
        )

    def _value(self, name: str, row: dict[str, Any], source: str) -> Any:
        path = self.paths[name]
        if path in row:
            return row[path]
        try:
            return _follow(row, path.split("."))
        except (LookupError, TypeError, ValueError) as error:
            what = f"{source}: {self.key}.{name}={path} leads to nothing in this row ({error})"
            raise RowError(f"{what}; correct the path, or the row", WRONG_TYPE) from None


def _root(path: str, names: set[str], name: str) -> str:
    root = path if path in names else path.split(".")[0]
    if root not in names:
        raise KeyError(name)
    return root


def _follow(value: Any, steps: list[str]) -> Any:
    """What a path leads to; null where it ends early in a null."""
    for place, step in enumerate(steps):
        if value is None:
            return None
        if step == EACH:
            if not isinstance(value, list):
                raise TypeError(f"{EACH} asks for a list, and there is a value of type {type(value).__name__}")
            return [_follow(item, steps[place + 1 :]) for item in value]
        if isinstance(value, list):
            if not step.isdecimal() or int(step) >= len(value):
                raise LookupError(f"a list of {len(value)} has no item {step}")
            value = value[int(step)]
        elif isinstance(value, dict):
            if step not in value:
                raise LookupError(f"no field {step} among {', '.join(map(str, value)) or 'none'}")
            value = value[step]
        else:
            raise TypeError(f"{step} is looked up in a value of type {type(value).__name__}")
    return value
