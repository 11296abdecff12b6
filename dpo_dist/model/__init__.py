"""Load policy and reference; what an architecture supports.

folder.py        a name becomes a folder on disk, and tells which weights it holds
architecture.py  which architectures can be packed, which can share prompts
fit.py           whether a folder's files fit its configuration
slices.py        under ZeRO-3 every rank reads the slices it owns
scoring.py       weights in memory, sharded as they are read, that answer with log-probabilities
"""

from dpo_dist.model.architecture import (
    PACKABLE_ROPE,
    SHARES_PROMPTS,
    WINDOW_IN_MASK,
    attention_needs,
    decide_sharing,
    load_config,
    logit_transform,
)
from dpo_dist.model.fit import Fit, find_fit
from dpo_dist.model.folder import identity, num_parameters, resolve_folder
from dpo_dist.model.scoring import DTYPES, ScoringModel, load_model, sharded_loading
from dpo_dist.model.slices import node_groups

__all__ = [
    "DTYPES",
    "PACKABLE_ROPE",
    "SHARES_PROMPTS",
    "WINDOW_IN_MASK",
    "Fit",
    "ScoringModel",
    "attention_needs",
    "decide_sharing",
    "find_fit",
    "identity",
    "load_config",
    "load_model",
    "logit_transform",
    "node_groups",
    "num_parameters",
    "resolve_folder",
    "sharded_loading",
]
