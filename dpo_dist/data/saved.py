"""The folder that `save_to_disk` of the library `datasets` writes: Arrow files, and a list of them in their order."""

import json
from pathlib import Path
from typing import Any

from dpo_dist.config import DataSource
from dpo_dist.errors import DataError

_STATE, _SPLITS = "state.json", "dataset_dict.json"


def saved_files(folder: Path, source: DataSource, key: str) -> tuple[tuple[Path, str], ...] | None:
    """Its files in order, each with its name in messages; None if it is no such folder.

    Args:
        folder: that `source` names.
        source: its split is that of a `DatasetDict`; a single data set has whichever it was saved with.
        key: the entry's place in the configuration, for messages.
    Raises:
        DataError: the split is not there, or rows were chosen that the files do not show.
    """
    shown = source.path.rstrip("/")
    if (folder / _SPLITS).is_file():
        splits = _read(folder / _SPLITS).get("splits") or []
        if source.split not in splits:
            raise DataError(
                f"{key}.split={source.split} is not in the folder {source.path}, which holds {', '.join(splits)}; set "
                "split to one of them"
            )
        folder, shown = folder / source.split, f"{shown}/{source.split}"
    if not (folder / _STATE).is_file():
        return None
    state = _read(folder / _STATE)
    split = state.get("_split")
    if split is not None and split != source.split and not (folder.parent / _SPLITS).is_file():
        raise DataError(
            f"{key}.split={source.split} is not in the folder {source.path}, which holds {split}; set split to it"
        )
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise DataError(
            f"{key}.path={source.path} was saved with rows chosen or reordered, which its files do not show; save "
            "dataset.flatten_indices() instead"
        )
    names = [str(entry["filename"]) for entry in state.get("_data_files") or [] if isinstance(entry, dict)]
    if missing := [name for name in names if Path(name).name != name or not (folder / name).is_file()]:
        raise DataError(f"{key}.path={source.path} lacks {missing[0]}, which its {_STATE} names; copy the folder again")
    return tuple((folder / name, f"{shown}/{name}") for name in names)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); save the data set again") from None
    return values if isinstance(values, dict) else {}
