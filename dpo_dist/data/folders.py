"""Which files of a folder are those of a split."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from typing import TypeVar

from dpo_dist.config import DataSource
from dpo_dist.data.files import data_suffix
from dpo_dist.data.saved import saved_files
from dpo_dist.errors import DataError

_SHARD = re.compile(r"-(?P<number>\d{5})-of-(?P<total>\d{5})\.")
_DESCRIPTIONS = frozenset({"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"})
_Path = TypeVar("_Path", bound=PurePath)


def split_files(folder: Path, source: DataSource, key: str) -> tuple[tuple[Path, str], ...]:
    """`<split>.<suffix>`, or the shards `<split>-00000-of-00002.<suffix>` in order, here or in the folder `data`.

    A folder that `save_to_disk` has written names its files itself.

    Args:
        folder: that `source` names.
        source: its split is looked for.
        key: the entry's place in the configuration, for messages.
    Returns:
        The files, each with its name in messages.
    Raises:
        DataError: the split is not there, or not once and whole.
    """
    saved = saved_files(folder, source, key)
    if saved is not None:
        return saved
    found = data_files(path for path in folder.iterdir() if path.is_file())
    inner = folder / "data"
    if inner.is_dir() and not any(path.name.startswith(source.split) for path in found):
        found = data_files(path for path in inner.iterdir() if path.is_file())  # as in a clone of a hub repository
    chosen = files_of_split(found, source, key)
    if not chosen:
        below = sorted({path.parent for path in folder.rglob("*") if data_suffix(path) is not None} - {folder})
        hint = f" (its folder {below[0].relative_to(folder)} has some: name that one)" if below else ""
        raise no_such_split(found, source, key, hint)
    shown = source.path.rstrip("/")
    return tuple((path, f"{shown}/{path.relative_to(folder)}") for path in chosen)


def data_files(paths: Iterable[_Path]) -> list[_Path]:
    """Those that hold rows, by their names and in the order of these."""
    return sorted(path for path in paths if path.name not in _DESCRIPTIONS and data_suffix(path) is not None)


def files_of_split(found: Sequence[_Path], source: DataSource, key: str) -> list[_Path]:
    """Those of the split that `source` names: one, or all shards of it; none if it is not among them.

    Raises:
        DataError: it is there more than once, or a shard is missing.
    """
    stems = {path: path.name[: path.name.lower().rindex(data_suffix(path) or "")] for path in found}
    whole = [path for path in found if stems[path] == source.split]
    shards = [path for path in found if stems[path].startswith(f"{source.split}-")]
    if len(whole) > 1 or (whole and shards):
        names = ", ".join(path.name for path in (*whole, *shards))
        raise DataError(
            f"{key}.path={source.shown} holds split {source.split} more than once ({names}); keep one of them"
        )
    _require_complete(shards, source, key)
    return whole or shards


def no_such_split(found: Sequence[PurePath], source: DataSource, key: str, hint: str = "") -> DataError:
    """What to raise where a folder has no file of the split; `hint` tells where others are."""
    names = ", ".join(path.name for path in found) or "no data file"
    return DataError(
        f"{key}.split={source.split} is not in the folder {source.shown}, which holds {names}{hint}; "
        f"name a file {source.split}.jsonl, or set split to one that is there"
    )


def _require_complete(shards: Sequence[PurePath], source: DataSource, key: str) -> None:
    """Refuse shards of which one is missing, or there twice."""
    found = [match for path in shards if (match := _SHARD.search(path.name))]
    if not found:
        return
    totals, numbers = {match["total"] for match in found}, sorted(int(match["number"]) for match in found)
    if len(totals) > 1 or numbers != list(range(int(found[0]["total"]))):
        names = ", ".join(path.name for path in shards)
        raise DataError(
            f"{key}.path={source.shown} does not hold every shard of split {source.split} once ({names}); copy the "
            "folder again, or remove what is left of another version"
        )
