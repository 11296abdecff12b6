"""log pi_ref: from a live sharded engine.

source.py  what every source answers
live.py    a second, sharded engine in the same step
"""

from dpo_dist.reference.live import LiveReference
from dpo_dist.reference.source import Reference

__all__ = ["LiveReference", "Reference"]
