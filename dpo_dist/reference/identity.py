"""What stored log-probabilities are valid for, and the small file that says so in their folder."""

import json
import os
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from pathlib import Path

import xxhash

from dpo_dist.durable import sync
from dpo_dist.errors import ConfigError

IDENTITY_FILE = "reference.json"
# Raise when the files of a folder are to be read in another way.
FORMAT = 1
# Raise when the same weights and tokens give other values by more than rounding.
NUMERICS_VERSION = 1


@dataclass(frozen=True)
class CacheIdentity:
    """The reference whose log-probabilities are stored; all but its name must be equal for a value to be used."""

    weights: str  # a hash of them
    dtype: str  # of the forward pass
    numerics: str  # see `numerics_of`
    model: str = field(default="", compare=False)  # where it was found, for people

    @property
    def seed(self) -> int:
        """64 bits that go into the checksum of every row, so that another reference's row is none."""
        return xxhash.xxh3_64_intdigest(json.dumps([FORMAT, self.weights, self.dtype, self.numerics]).encode())


_COMPARED = tuple(field.name for field in fields(CacheIdentity) if field.compare)


def numerics_of(attention: str, uses_liger: bool = False, is_compiled: bool = False) -> str:
    """How values are computed: the version of our own arithmetic, and the kernels: `1-sdpa`, `1-sdpa-liger`."""
    return f"{NUMERICS_VERSION}-{attention}{'-liger' if uses_liger else ''}{'-compiled' if is_compiled else ''}"


def check_identity(folder: Path, identity: CacheIdentity, ignored: Collection[str]) -> bool:
    """Whether a folder is the cache of this reference already; one that is missing or empty may become it.

    Args:
        folder: reference.cache_dir.
        identity: of this run's reference.
        ignored: names of files that may be there before the folder has an identity.
    Raises:
        ConfigError: if it holds anything else.
    """
    try:
        text = (folder / IDENTITY_FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        _require_empty(folder, ignored)
        return False
    except NotADirectoryError:
        raise ConfigError(f"reference.cache_dir={folder} is not a folder; give a folder, or leave it out") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"reference.cache_dir={folder} cannot be read ({error}); give another folder") from error
    stored = _parsed(folder, text)
    differing = [
        f"{name}={stored[name]} (this run: {own})"
        for name in _COMPARED
        if stored[name] != (own := getattr(identity, name))
    ]
    if differing and stored["weights"] != identity.weights and stored["model"]:
        differing.append(f"made from {stored['model']} (this run: {identity.model})")
    if differing:
        raise ConfigError(
            f"reference.cache_dir={folder} holds log-probabilities of another reference: {', '.join(differing)}; "
            "give another folder, or leave reference.cache_dir out"
        )
    return True


def write_identity(folder: Path, identity: CacheIdentity) -> None:
    """Make an empty folder the cache of a reference; a reader sees all of the file or none."""
    staging = folder / f".{IDENTITY_FILE}"
    staging.write_text(json.dumps({"format": FORMAT, **vars(identity)}, indent=2) + "\n", encoding="utf-8")
    sync(staging)
    os.replace(staging, folder / IDENTITY_FILE)
    sync(folder)


def _require_empty(folder: Path, ignored: Collection[str]) -> None:
    try:
        names = sorted({entry.name for entry in os.scandir(folder)} - {f".{IDENTITY_FILE}", *ignored})
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"reference.cache_dir={folder} cannot be read ({error}); give another folder") from error
    if names:
        raise ConfigError(
            f"reference.cache_dir={folder} holds {names[0]} and no {IDENTITY_FILE}, so it is not a cache of "
            "log-probabilities; give a new or empty folder, or leave reference.cache_dir out"
        )


def _parsed(folder: Path, text: str) -> dict[str, str]:
    way_out = "delete the folder, or give another one"
    try:
        stored = json.loads(text)
        number = stored.pop("format")
    except (ValueError, AttributeError, KeyError, TypeError):
        raise ConfigError(f"reference.cache_dir={folder}: {IDENTITY_FILE} is damaged; {way_out}") from None
    if number != FORMAT:
        raise ConfigError(
            f"reference.cache_dir={folder} has format {number}, and this version reads and writes {FORMAT}; {way_out}"
        )
    stored.setdefault("model", "")
    if not all(isinstance(stored.get(field.name), str) for field in fields(CacheIdentity)):
        raise ConfigError(f"reference.cache_dir={folder}: {IDENTITY_FILE} is damaged; {way_out}")
    return stored
