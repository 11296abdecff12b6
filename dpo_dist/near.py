"""Texts that are nearly the same: MinHash finds candidates, and what they share decides. Works on token ids.

    T tokens

A shingle is a run of three tokens, as a number. The likeness of two texts is the share of shingles that both have among
those that one of them has (Jaccard's index): 1 for equal texts, 0 where nothing is shared. Broder 1997, "On the
resemblance and containment of documents".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from jaxtyping import Int32, UInt32

Shingles = UInt32[np.ndarray, " _"]  # texts have different numbers of them

_RUN = 3  # tokens of a shingle
_HASHES = 128
_MISSED = 1e-3  # of pairs that are just as alike as the threshold
_FACTORS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9)
_COMMON_FROM, _COMMON = 16, 0.5  # texts; the share of them that have a shingle that tells nothing


def is_available() -> bool:
    """Whether the optional package is installed."""
    return find_spec("datasketch") is not None


def shingles(ids: Int32[np.ndarray, " T"]) -> Shingles:
    """The shingles of a text, each once, sorted; a text shorter than a run is one shingle."""
    if not len(ids):
        return np.zeros(0, dtype=np.uint32)
    wide = ids.astype(np.uint64) + np.uint64(1)
    run = min(_RUN, len(ids))
    length = len(ids) - run + 1
    mixed = np.full(length, run, dtype=np.uint64)
    for place, factor in enumerate(_FACTORS[:run]):
        mixed = (mixed ^ wide[place : place + length]) * np.uint64(factor)
        mixed ^= mixed >> np.uint64(29)
    return np.unique((mixed >> np.uint64(32)).astype(np.uint32))


def common_shingles(texts: Sequence[Shingles]) -> Shingles:
    """Those that most texts have: a system prompt makes no two questions alike.

    None of fewer than 16 texts, for most of these may well be copies of one.
    """
    if len(texts) < _COMMON_FROM:
        return np.zeros(0, dtype=np.uint32)
    found, counts = np.unique(np.concatenate(list(texts)), return_counts=True)
    return found[counts > _COMMON * len(texts)]


def without(texts: Sequence[Shingles], common: Shingles) -> list[Shingles]:
    """The same texts without some shingles."""
    return [text[~np.isin(text, common)] for text in texts] if len(common) else list(texts)


def likeness(one: Shingles, other: Shingles) -> float:
    """From 0, nothing shared, to 1."""
    shared = len(np.intersect1d(one, other, assume_unique=True))
    together = len(one) + len(other) - shared
    return shared / together if together else 1.0


@dataclass(frozen=True, eq=False)
class Item:
    """A text, or several in their order, with its sketch."""

    parts: tuple[Shingles, ...]
    sketch: Any


class NearIndex:
    """Texts, or tuples of them, among which near ones are found; two tuples are near where each of their parts is.

    Args:
        threshold: likeness from which on two texts are near, above 0 and up to 1.
    """

    def __init__(self, threshold: float) -> None:
        import datasketch  # noqa: PLC0415  (optional package)

        self._threshold = threshold
        self._package = datasketch
        self._lsh: Any = datasketch.MinHashLSH(threshold=threshold, num_perm=_HASHES, params=_bands(threshold))
        self._parts: dict[int, tuple[Shingles, ...]] = {}

    def item(self, *parts: Shingles) -> Item:
        """What is looked for or added."""
        # Where every part is near, so are all shingles together, each told apart by its part.
        together = [part ^ np.uint32(place * 0x5BD1E995 & 0xFFFFFFFF) for place, part in enumerate(parts)]
        sketch = self._package.MinHash(num_perm=_HASHES, hashfunc=int)
        sketch.update_batch(np.concatenate(together).tolist())
        return Item(parts, sketch)

    def find(self, item: Item) -> int | None:
        """The least key of a near one; None if there is none, and for what has no shingle."""
        if not any(len(part) for part in item.parts):
            return None
        candidates = sorted(self._lsh.query(item.sketch))
        return next((key for key in candidates if self._is_near(item.parts, self._parts[key])), None)

    def add(self, key: int, item: Item) -> None:
        """Take one; its key is new."""
        if any(len(part) for part in item.parts):
            self._parts[key] = item.parts
            self._lsh.insert(key, item.sketch)

    def _is_near(self, one: tuple[Shingles, ...], other: tuple[Shingles, ...]) -> bool:
        return all(likeness(*both) >= self._threshold for both in zip(one, other, strict=True))


def _bands(threshold: float) -> tuple[int, int]:
    """Bands and rows of each: as many rows as nearly all texts at the threshold are still found with."""
    for rows in range(16, 1, -1):
        bands = _HASHES // rows
        if (1 - threshold**rows) ** bands <= _MISSED:
            return bands, rows
    return _HASHES, 1
