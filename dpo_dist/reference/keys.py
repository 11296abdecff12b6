"""A completion's key: 16 bytes from its prompt's and its own token ids, equal on every machine.

    N keys   W distinct keys

An array of keys is (N, 2) unsigned 64-bit: the two halves of each. A million keys are 16 MB, and are found by sorting.
"""

import struct
from collections.abc import Iterable, Iterator

import numpy as np
import xxhash
from jaxtyping import Int64, UInt64

from dpo_dist.tokenization import TokenizedDataset
from dpo_dist.tokenization.dataset import IdColumns

KEY_BYTES = 16
_LENGTHS = struct.Struct("<qq")


def dataset_keys(datasets: Iterable[TokenizedDataset]) -> UInt64[np.ndarray, "N 2"]:
    """Keys of every completion of some data sets, in the order of their `completion_lengths.flat`."""
    parts = [b"".join(_digests(columns)) for dataset in datasets for columns in dataset.id_columns()]
    return np.frombuffer(b"".join(parts), dtype="<u8").reshape(-1, 2)


class DistinctKeys:
    """Keys without repetition, sorted.

    Attributes:
        keys: each once.
        first: of each, where it occurs first in the array that was given.
        group: of each given key, which of `keys` it is.
    """

    def __init__(self, keys: UInt64[np.ndarray, "N 2"]) -> None:
        order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: of equal keys the first comes first
        ordered = keys[order]
        is_new = np.ones(len(keys), dtype=bool)
        is_new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
        self.keys: UInt64[np.ndarray, "W 2"] = ordered[is_new]
        self.first: Int64[np.ndarray, " W"] = order[is_new]
        self.group: Int64[np.ndarray, " N"] = np.empty(len(keys), dtype=np.int64)
        self.group[order] = np.cumsum(is_new) - 1

    def __len__(self) -> int:
        """Number of distinct keys."""
        return len(self.keys)

    def find(self, keys: UInt64[np.ndarray, "N 2"]) -> Int64[np.ndarray, " N"]:
        """Which of `keys` each one is; -1 if none."""
        found = np.full(len(keys), -1, dtype=np.int64)
        place = np.searchsorted(self.keys[:, 0], keys[:, 0])
        asked = np.arange(len(keys))
        # One round, unless two keys share their first half.
        while len(asked):
            in_range = place < len(self.keys)
            asked, place = asked[in_range], place[in_range]
            found[asked] = np.where((self.keys[place] == keys[asked]).all(axis=1), place, found[asked])
            same_half = (self.keys[place, 0] == keys[asked, 0]) & (found[asked] < 0)
            asked, place = asked[same_half], place[same_half] + 1
        return found


def _digests(columns: IdColumns) -> Iterator[bytes]:
    prompt_ids, completion_ids = _bytes_of(columns.prompt_ids), _bytes_of(columns.completion_ids)
    prompt_starts, completion_starts = columns.prompt_starts.tolist(), columns.completion_starts.tolist()
    first_completion = columns.first_completion.tolist()
    for row in range(len(first_completion) - 1):
        begin, end = prompt_starts[row], prompt_starts[row + 1]
        prompt = prompt_ids[4 * begin : 4 * end]
        for k in range(first_completion[row], first_completion[row + 1]):
            start, stop = completion_starts[k], completion_starts[k + 1]
            # Lengths first, so that no other split of the same ids has the same bytes.
            lengths = _LENGTHS.pack(end - begin, stop - start)
            yield xxhash.xxh3_128_digest(b"".join((lengths, prompt, completion_ids[4 * start : 4 * stop])))


def _bytes_of(ids: np.ndarray) -> memoryview:
    return memoryview(ids.astype("<i4").tobytes())
