"""Which completions of some data sets are stored, and which have to be computed.

N completions of all data sets, in the order of their `completion_lengths.flat`
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int64, UInt8, UInt64

from dpo_dist.reference.keys import DistinctKeys
from dpo_dist.reference.store import StoredRows, first_of_each

STORED, MISSING, TOKENS_MISSING, REPEATED = range(4)


@dataclass(frozen=True)
class Lookup:
    """What is known of every completion."""

    values: Float32[np.ndarray, " N"]
    """The stored sum, nats; NaN where there is none."""
    status: UInt8[np.ndarray, " N"]
    """STORED; MISSING; TOKENS_MISSING: there is a sum, and the tokens are to be computed; REPEATED: missing, and equal
    to an earlier one, whose value it gets. Of equal completions only the first is ever to be computed."""
    sources: Int64[np.ndarray, " R"]
    """For each REPEATED one, in order, the place of the one it repeats."""
    num_distinct: int
    """Completions that differ from all others."""


def look_up(wanted: UInt64[np.ndarray, "N 2"], stored: StoredRows, with_tokens: bool) -> Lookup:
    """Find the keys of completions among stored rows.

    Args:
        wanted: a key for each completion.
        stored: rows of the reference; of equal keys the first is used.
        with_tokens: a row counts only if it has the value of every token.
    """
    distinct, known = DistinctKeys(wanted), DistinctKeys(stored.keys)
    place = known.find(distinct.keys)
    is_known = place >= 0
    sums = np.full(len(distinct), np.nan, dtype=np.float32)
    sums[is_known] = stored.logps[known.first[place[is_known]]]
    status_of_first = np.where(is_known, STORED, MISSING).astype(np.uint8)
    if with_tokens:
        complete = np.zeros(len(known), dtype=bool)
        complete[known.group[first_of_each(stored.keys, stored.has_tokens)]] = True
        status_of_first[is_known] = np.where(complete[place[is_known]], STORED, TOKENS_MISSING)
    status = np.where(is_known, STORED, REPEATED).astype(np.uint8)[distinct.group]
    status[distinct.first] = status_of_first
    sources = distinct.first[distinct.group[status == REPEATED]]
    return Lookup(sums[distinct.group], status, sources, len(distinct))
