"""Implicit rewards of a step, and where numbers are written.

sums.py  what a step adds up
window.py means over any number of steps
rewards.py  the mean reward of everything that was trained on
file.py  metrics.jsonl
trackers.py  who gets the same numbers
"""

from dpo_dist.metrics.file import MetricsFile, Tracker
from dpo_dist.metrics.rewards import RewardMean
from dpo_dist.metrics.sums import (
    COUNTS,
    HEALTH,
    LOGGED_STATISTICS,
    PER_PAIR,
    PER_TOKEN,
    SUMS,
    WALL_CLOCK,
    loss_of,
    not_finite,
    padded_tokens,
    step_sums,
    sum_names,
)
from dpo_dist.metrics.trackers import TRACKER_PACKAGES, TRACKERS
from dpo_dist.metrics.window import Window

__all__ = [
    "COUNTS",
    "HEALTH",
    "LOGGED_STATISTICS",
    "PER_PAIR",
    "PER_TOKEN",
    "SUMS",
    "TRACKERS",
    "TRACKER_PACKAGES",
    "WALL_CLOCK",
    "MetricsFile",
    "RewardMean",
    "Tracker",
    "Window",
    "loss_of",
    "not_finite",
    "padded_tokens",
    "step_sums",
    "sum_names",
]
