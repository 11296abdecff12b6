"""Adapters by PEFT: made, read, put into a model, exported. PEFT is imported here and nowhere else.

Loaded only where an adapter is configured: `cli` imports it inside the functions that need it.

attach.py    put an adapter into a loaded model
settings.py  PEFT's configuration of a new one, and whether it fits the model
files.py     one that is on disk, and whether it is of this model
export.py    a trained adapter as a folder that PEFT loads, or merged into its base model
"""

from dpo_dist.adapters.attach import attach_adapter, require_adapter
from dpo_dist.adapters.export import (
    export_adapter,
    export_adapter_checkpoint,
    export_merged,
    write_adapter_settings,
)

__all__ = [
    "attach_adapter",
    "export_adapter",
    "export_adapter_checkpoint",
    "export_merged",
    "require_adapter",
    "write_adapter_settings",
]
