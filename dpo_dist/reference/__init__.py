"""log pi_ref: from a live sharded engine.

source.py  what every source answers
live.py    a second, sharded engine in the same step
sync.py    a live reference that follows the policy
saved.py   its weights in a checkpoint
"""

from dpo_dist.reference.live import LiveReference
from dpo_dist.reference.saved import load_reference, save_reference
from dpo_dist.reference.source import Reference
from dpo_dist.reference.sync import ReferenceSync

__all__ = ["LiveReference", "Reference", "ReferenceSync", "load_reference", "save_reference"]
