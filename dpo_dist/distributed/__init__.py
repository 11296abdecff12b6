"""Ranks, process groups, and the few collectives we use.

collectives.py  sums, JSON, errors that are raised on all ranks
stopping.py     a request to stop
meeting.py      how they find each other, and why they did not
groups.py       who the ranks are, and their process group
"""

from dpo_dist.distributed.collectives import (
    all_gather_json,
    barrier,
    broadcast_json,
    broadcast_tensor,
    join_over_ranks,
    raise_together,
    raising_together,
    require_agreement,
    sum_over_ranks,
)
from dpo_dist.distributed.groups import Ranks, end_with_launcher, is_first_of_node, launched_rank, process_group
from dpo_dist.distributed.meeting import require_announced
from dpo_dist.distributed.stopping import Stopped, StopRequest

__all__ = [
    "Ranks",
    "StopRequest",
    "Stopped",
    "all_gather_json",
    "barrier",
    "broadcast_json",
    "broadcast_tensor",
    "end_with_launcher",
    "is_first_of_node",
    "join_over_ranks",
    "launched_rank",
    "process_group",
    "raise_together",
    "raising_together",
    "require_agreement",
    "require_announced",
    "sum_over_ranks",
]
