"""What a model's folder and its configuration say, before anything of it is loaded. Imports no model class.

folder.py          a name becomes a folder on disk, and tells which weights it holds
digests.py         a hash of its weights
shrunk.py          the same architecture with small sizes
architecture.py    which architectures can be packed, which can share prompts
adapter_folder.py  the kind of an adapter, also of one on disk
"""

from dpo_dist.pretrained.adapter_folder import (
    KINDS,
    PROMPT_LEARNING,
    adapter_kind,
    is_prompt_learning,
    require_adapter_folder,
)
from dpo_dist.pretrained.architecture import (
    DTYPES,
    PACKABLE_ROPE,
    SHARES_PROMPTS,
    WINDOW_IN_MASK,
    attention_needs,
    decide_sharing,
    load_config,
    logit_transform,
)
from dpo_dist.pretrained.digests import adapter_identity, identity
from dpo_dist.pretrained.folder import (
    first_line,
    num_parameters,
    raise_if_own_code,
    resolve_folder,
    weight_files,
)

__all__ = [
    "DTYPES",
    "KINDS",
    "PACKABLE_ROPE",
    "PROMPT_LEARNING",
    "SHARES_PROMPTS",
    "WINDOW_IN_MASK",
    "adapter_identity",
    "adapter_kind",
    "attention_needs",
    "decide_sharing",
    "first_line",
    "identity",
    "is_prompt_learning",
    "load_config",
    "logit_transform",
    "num_parameters",
    "raise_if_own_code",
    "require_adapter_folder",
    "resolve_folder",
    "weight_files",
]
