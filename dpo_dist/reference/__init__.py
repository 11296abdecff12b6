"""log pi_ref: from a live sharded engine, or computed once and stored.

source.py     what every source answers
live.py       a second, sharded engine in the same step
cache.py      stored values: looked up, computed where they are missing, some of them proved
cached.py     the same as a source

identity.py   what stored values are valid for
keys.py       a completion's key
rows.py       rows in Arrow, each with a checksum
store.py      the folder of one reference's rows
lookup.py     which completions are stored
selection.py  the others as examples, and a model's values of them
"""

from dpo_dist.reference.cache import ReferenceCache, open_cache
from dpo_dist.reference.cached import CachedReference
from dpo_dist.reference.identity import CacheIdentity, numerics_of
from dpo_dist.reference.live import LiveReference
from dpo_dist.reference.source import Reference

__all__ = [
    "CacheIdentity",
    "CachedReference",
    "LiveReference",
    "Reference",
    "ReferenceCache",
    "numerics_of",
    "open_cache",
]
