"""Preference losses: pure functions of log-probabilities and lengths, in one visible table.

formulas.py     the functions
table.py        every loss: function, needs, settings, source, use
divergences.py  what takes the place of the log-ratio (f-DPO)
values.py       what losses are asked about
objective.py    the configured sum of losses
page.py         the table for people
"""

from dpo_dist.losses.objective import Objective, at_equality, bind, mean_loss, near_equality
from dpo_dist.losses.page import losses_table
from dpo_dist.losses.table import LOSSES, UNITS, LossSpec
from dpo_dist.losses.values import PairValues

__all__ = [
    "LOSSES",
    "UNITS",
    "LossSpec",
    "Objective",
    "PairValues",
    "at_equality",
    "bind",
    "losses_table",
    "mean_loss",
    "near_equality",
]
