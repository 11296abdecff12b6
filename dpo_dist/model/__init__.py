"""Load policy and reference; what an architecture supports.

folder.py        a name becomes a folder on disk, and tells which weights it holds
architecture.py  which architectures can be packed, which can share prompts
fit.py           whether a folder's files fit its configuration
slices.py        under ZeRO-3 every rank reads the slices it owns
scoring.py       weights in memory, sharded as they are read, that answer with log-probabilities
packed.py        what the decoder is handed: a micro-batch's tokens, and virtual ones
adapted.py       an adapter inside a model, and the model without it
adapters.py      put an adapter into a loaded model
adapter_settings.py  PEFT's configuration of a new one, and whether it fits the model
adapter_files.py     one that is on disk, and whether it is of this model
quantization.py  frozen weights in four bits
"""

from dpo_dist.model.adapted import Adapter, base_name
from dpo_dist.model.adapters import adapter_kind, attach_adapter, is_prompt_learning, require_adapter
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
from dpo_dist.model.folder import adapter_identity, identity, num_parameters, resolve_folder
from dpo_dist.model.quantization import four_bits
from dpo_dist.model.scoring import DTYPES, ScoringModel, load_model, sharded_loading
from dpo_dist.model.slices import node_groups

__all__ = [
    "DTYPES",
    "PACKABLE_ROPE",
    "SHARES_PROMPTS",
    "WINDOW_IN_MASK",
    "Adapter",
    "Fit",
    "ScoringModel",
    "adapter_identity",
    "adapter_kind",
    "attach_adapter",
    "attention_needs",
    "base_name",
    "decide_sharing",
    "find_fit",
    "four_bits",
    "identity",
    "is_prompt_learning",
    "load_config",
    "load_model",
    "logit_transform",
    "node_groups",
    "num_parameters",
    "require_adapter",
    "resolve_folder",
    "sharded_loading",
]
