"""Files that are shipped with the package, and how a relative path is looked up."""

import glob
import os
from importlib.resources import files
from pathlib import Path
from typing import Literal

from dpo_dist.config.addresses import is_url
from dpo_dist.errors import ConfigError

PackageFolder = Literal["configs", "deepspeed_configs"]


def package_folder(folder: PackageFolder) -> Path:
    """The folder inside an installed package, or beside it in a source checkout or editable installation."""
    packed = Path(str(files("dpo_dist"))) / folder
    return packed if packed.is_dir() else Path(__file__).resolve().parents[2] / folder


def package_file(folder: PackageFolder, name: str) -> Path:
    """A shipped file by its name, e.g. `package_file("deepspeed_configs", "zero3.json")`.

    Raises:
        ConfigError: if there is no such file.
    """
    path = package_folder(folder) / name
    if not path.is_file():
        raise ConfigError(
            f"{folder}/{name} is not among the shipped files; there are {', '.join(names(folder)) or 'none'}"
        )
    return path


def names(folder: PackageFolder) -> list[str]:
    """Names of the shipped files, without ending, sorted."""
    ending = {"configs": ".yaml", "deepspeed_configs": ".json"}[folder]
    return sorted(path.stem for path in package_folder(folder).glob(f"*{ending}"))


def find_input(value: str, beside: Path) -> str:
    """Absolute path of a file or folder, or of a pattern of files: from the current folder first, then from `beside`.

    What exists in neither place is returned as it is: it may be a hub id. So is a URL.
    """
    if is_url(value):
        return value
    path = os.path.expanduser(value)
    for folder in (os.getcwd(), os.path.abspath(beside)):
        candidate = os.path.normpath(os.path.join(folder, path))
        if os.path.exists(candidate) or (glob.has_magic(candidate) and glob.glob(candidate, recursive=True)):
            return candidate
    return value
