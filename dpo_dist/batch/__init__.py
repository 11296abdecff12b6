"""One micro-batch as flat tensors: shared prompts, scored positions, pairs.

layout.py       which queries see which keys
arrangement.py  where each token lies in it
micro_batch.py  one packed forward and what to score in it
rank_work.py    one rank's share of a planned step
"""

from dpo_dist.batch.layout import AttentionLayout, build_layout
from dpo_dist.batch.micro_batch import MicroBatch, build_micro_batch
from dpo_dist.batch.rank_work import Examples, RankWork

__all__ = ["AttentionLayout", "Examples", "MicroBatch", "RankWork", "build_layout", "build_micro_batch"]
