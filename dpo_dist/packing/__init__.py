"""A step's examples spread over ranks and micro-batches by cost.

sizes.py  what the packer has to know of an example: its lengths
cost.py   how long an example takes, from its lengths and the model's shape
bins.py   items into bins that ranks run side by side
plan.py   who computes what in a step
"""

from dpo_dist.packing.bins import slots_of, span
from dpo_dist.packing.cost import TOKENS, AttentionCost, CostModel
from dpo_dist.packing.plan import Bins, Packer, StepPlan
from dpo_dist.packing.sizes import ExampleSize, Lengths, input_tokens_of, longest_example, sizes_of

__all__ = [
    "TOKENS",
    "AttentionCost",
    "Bins",
    "CostModel",
    "ExampleSize",
    "Lengths",
    "Packer",
    "StepPlan",
    "input_tokens_of",
    "longest_example",
    "sizes_of",
    "slots_of",
    "span",
]
