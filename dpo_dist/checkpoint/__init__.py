"""Save, verify and resume a run exactly; export it.

| file | what it is |
|---|---|
| `state.py` | The part of a run's state that is ours: counters as JSON, random generators as JSON and safetensors |
| `files.py` | Durable writes: fsync, atomic replace, and what a full disk looks like from Python |
| `strict_json.py` | JSON whose numbers can be computed with |
| `pickles.py` | Which pickled classes a shard may name, checked before anything is unpickled |
| `manifest.py` | Which files a checkpoint consists of, with sizes and hashes; verification |
| `saved_states.py` | What shard files hold, read offline: any range of any parameter, whoever saved it |
| `shards.py` | DeepSpeed's shard files: write and load |
| `weights.py` | Everything that an update changes: the policy, and a reference that follows it |
| `agreeing.py` | What all ranks do together on the file system: an error of one is raised on all |
| `parts.py` | What a rank contributes to a checkpoint: written at once, or by a thread from copies |
| `listing.py` | The folders of `checkpoints/`: which there are, in which order, and which go |
| `store.py` | The `checkpoints/` folder of a run: save and find |
| `writer.py` | Parameters, one at a time, into a folder of safetensors that transformers loads |
| `export.py` | The trained model as a Hugging Face folder, from a live engine or from a checkpoint |
"""

from dpo_dist.checkpoint.export import export_checkpoint, export_model, require_unused, write_assets
from dpo_dist.checkpoint.files import explain_write_error, free_bytes, human_bytes, replace_text
from dpo_dist.checkpoint.manifest import LATEST_FILE, MANIFEST_FILE, verify
from dpo_dist.checkpoint.saved_states import Layout, layout_at, layout_of
from dpo_dist.checkpoint.shards import load_shards, save_shards
from dpo_dist.checkpoint.state import RunState, changed_settings, require_same
from dpo_dist.checkpoint.store import CheckpointStore
from dpo_dist.checkpoint.weights import Weights

__all__ = [
    "LATEST_FILE",
    "MANIFEST_FILE",
    "CheckpointStore",
    "Layout",
    "RunState",
    "Weights",
    "changed_settings",
    "explain_write_error",
    "export_checkpoint",
    "export_model",
    "free_bytes",
    "human_bytes",
    "layout_at",
    "layout_of",
    "load_shards",
    "replace_text",
    "require_same",
    "require_unused",
    "save_shards",
    "verify",
    "write_assets",
]
