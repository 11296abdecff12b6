"""What is wrong with preference pairs, in numbers. Works on numbers that stand for texts; knows no files and no tokens.

    P pairs   N sequences of ids

Equal texts have equal numbers. A completion is told apart with its prompt: the same answer to two questions is two.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import xxhash
from jaxtyping import Int, Int64, UInt64


def digests(ids: Int[np.ndarray, " tokens"], starts: Int[np.ndarray, " N_plus_1"]) -> UInt64[np.ndarray, "N 2"]:
    """16 bytes of each sequence of ids, equal on every machine.

    Args:
        ids: of all sequences, one after another.
        starts: where each begins, and the end.
    """
    raw, bounds = memoryview(ids.astype("<i4").tobytes()), starts.tolist()
    found = [xxhash.xxh3_128_digest(raw[4 * begin : 4 * end]) for begin, end in pairwise(bounds)]
    return np.frombuffer(b"".join(found), dtype="<u8").reshape(-1, 2)


@dataclass(frozen=True)
class PairFaults:
    """Pairs that say nothing new, or cannot all be right; places among the P, in order.

    Attributes:
        repeated: say what an earlier pair says.
        contradicting: prefer a completion to one that others, directly or round a circle, prefer to it.
    """

    repeated: Int64[np.ndarray, " R"]
    contradicting: Int64[np.ndarray, " X"]


def find_faults(chosen: Int64[np.ndarray, " P"], rejected: Int64[np.ndarray, " P"]) -> PairFaults:
    """Look at all pairs of a data set.

    Args:
        chosen: number of each pair's chosen completion, below 2^31.
        rejected: of its rejected one.
    """
    _, first = np.unique((chosen << 31) | rejected, return_index=True)
    is_repeated = np.ones(len(chosen), dtype=bool)
    is_repeated[first] = False
    return PairFaults(np.flatnonzero(is_repeated), _in_circles(chosen, rejected))


def _in_circles(chosen: Int64[np.ndarray, " P"], rejected: Int64[np.ndarray, " P"]) -> Int64[np.ndarray, " X"]:
    """Pairs on a circle of preferences.

    A completion that is never rejected is on no circle, nor is one that is never chosen: their pairs are taken away, as
    long as there are such. Of the few that are left those are on a circle whose two completions reach each other.
    """
    left = np.arange(len(chosen))
    while True:
        goes_on = np.isin(chosen[left], rejected[left]) & np.isin(rejected[left], chosen[left])
        if goes_on.all():
            break
        left = left[goes_on]
    edges = list(zip(chosen[left].tolist(), rejected[left].tolist(), strict=True))
    circle_of = _circles(edges)
    return left[[circle_of[better] == circle_of[worse] for better, worse in edges]]


def _circles(edges: list[tuple[int, int]]) -> dict[int, int]:
    """A number for each node of a directed graph; equal for those that reach each other (Kosaraju's algorithm)."""
    ahead: dict[int, list[int]] = {node: [] for edge in edges for node in edge}
    behind: dict[int, list[int]] = {node: [] for node in ahead}
    for one, other in edges:
        ahead[one].append(other)
        behind[other].append(one)
    seen: set[int] = set()
    finished: list[int] = []  # a node after all that it reaches
    for root in ahead:
        stack = [(root, iter(ahead[root]))] if root not in seen else []
        seen.add(root)
        while stack:
            node, rest = stack[-1]
            if (following := next((one for one in rest if one not in seen), None)) is None:
                finished.append(node)
                stack.pop()
            else:
                seen.add(following)
                stack.append((following, iter(ahead[following])))
    circle_of: dict[int, int] = {}
    for root in reversed(finished):
        waiting = [root]
        while waiting:
            if (node := waiting.pop()) not in circle_of:
                circle_of[node] = root
                waiting += behind[node]
    return circle_of


def share_of_longer(chosen: Int64[np.ndarray, " P"], rejected: Int64[np.ndarray, " P"]) -> float | None:
    """Of the pairs that differ in length, those whose chosen completion is the longer one; None where none differ.

    So often would the rule "the longer one is better" be right. Singhal et al. 2023, "A Long Way to Go",
    arXiv:2310.03716: models learn it where the data let them.

    Args:
        chosen: length of each pair's chosen completion, tokens.
        rejected: of its rejected one.
    """
    differs = chosen != rejected
    return float((chosen > rejected)[differs].mean()) if differs.any() else None
