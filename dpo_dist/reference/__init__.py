"""log pi_ref: from a live sharded engine, from the policy with its adapters off, from a cache, or not at all.

source.py       what every source answers
choice.py       which of them is the cheapest exact one for a run
live.py         a second, sharded engine in the same step
sync.py         one that follows the policy
saved.py        its weights in a checkpoint
adapter_off.py  the policy with its adapters switched off
absent.py       no reference
cache.py        stored values: looked up, computed where they are missing, some of them proved
cached.py       the same as a source

identity.py   what stored values are valid for
keys.py       a completion's key
rows.py       rows in Arrow, each with a checksum
store.py      the folder of one reference's rows
lookup.py     which completions are stored
selection.py  the others as examples, and a model's values of them
"""

from dpo_dist.reference.absent import NoReference
from dpo_dist.reference.adapter_off import AdapterOffReference
from dpo_dist.reference.cache import ReferenceCache, open_cache
from dpo_dist.reference.cached import CachedReference
from dpo_dist.reference.choice import Situation, Source, choose_source
from dpo_dist.reference.identity import CacheIdentity, numerics_of
from dpo_dist.reference.live import LiveReference
from dpo_dist.reference.saved import load_reference, save_reference
from dpo_dist.reference.source import ModelReference, Reference
from dpo_dist.reference.sync import ReferenceSync

__all__ = [
    "AdapterOffReference",
    "CacheIdentity",
    "CachedReference",
    "LiveReference",
    "ModelReference",
    "NoReference",
    "Reference",
    "ReferenceCache",
    "ReferenceSync",
    "Situation",
    "Source",
    "choose_source",
    "load_reference",
    "numerics_of",
    "open_cache",
    "save_reference",
]
