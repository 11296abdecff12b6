"""log pi_ref: from a live sharded engine, from the policy with its adapters off, from a cache, or not at all.

source.py       what every source answers
live.py         a second, sharded engine in the same step
adapter_off.py  the policy with its adapters switched off
absent.py       no reference
choice.py       which of them is the cheapest exact one for a run
"""

from dpo_dist.reference.absent import NoReference
from dpo_dist.reference.adapter_off import AdapterOffReference
from dpo_dist.reference.choice import Situation, Source, choose_source
from dpo_dist.reference.live import LiveReference
from dpo_dist.reference.source import ModelReference, Reference

__all__ = [
    "AdapterOffReference",
    "LiveReference",
    "ModelReference",
    "NoReference",
    "Reference",
    "Situation",
    "Source",
    "choose_source",
]
