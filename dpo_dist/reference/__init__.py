"""log pi_ref: from a live sharded engine, from the policy with its adapters off, from a cache, or not at all.

source.py       what every source answers
live.py         a second, sharded engine in the same step
sync.py         one that follows the policy
saved.py        its weights in a checkpoint
adapter_off.py  the policy with its adapters switched off
absent.py       no reference
choice.py       which of them is the cheapest exact one for a run
"""

from dpo_dist.reference.absent import NoReference
from dpo_dist.reference.adapter_off import AdapterOffReference
from dpo_dist.reference.choice import Situation, Source, choose_source
from dpo_dist.reference.live import LiveReference
from dpo_dist.reference.saved import load_reference, save_reference
from dpo_dist.reference.source import ModelReference, Reference
from dpo_dist.reference.sync import ReferenceSync

__all__ = [
    "AdapterOffReference",
    "LiveReference",
    "ModelReference",
    "NoReference",
    "Reference",
    "ReferenceSync",
    "Situation",
    "Source",
    "choose_source",
    "load_reference",
    "save_reference",
]
