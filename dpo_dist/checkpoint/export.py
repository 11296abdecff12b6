"""The trained model as a Hugging Face folder, from a live engine or from a checkpoint."""

import copy
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dpo_dist.checkpoint.files import explain_write_error
from dpo_dist.checkpoint.manifest import MANIFEST_FILE, checkpoint_meant_by, verify
from dpo_dist.checkpoint.saved_states import full_parameters
from dpo_dist.checkpoint.writer import MAX_SHARD_BYTES, ModelWriter
from dpo_dist.distributed import Ranks, raise_together
from dpo_dist.errors import CheckpointError, ConfigError
from dpo_dist.pretrained import raise_if_own_code

ASSETS_FOLDER = "model_assets"
_ATTENTION_KEYS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")


def write_assets(
    folder: Path,
    model_config: Any,
    tokenizer: Any = None,
    generation_config: Any = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write what a model folder holds besides weights: config, generation config, tokenizer with its chat template.

    Args:
        folder: A model folder, or `checkpoint/model_assets`; made if it is not there.
        model_config: The configuration of the loaded model; it is not changed.
        tokenizer: None where the run needs none (pre-tokenised data).
        generation_config: None where the model has none.
        dtype: What the weights are saved in; None takes the configuration's, else float32.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(model_config)
    config.dtype = dtype or config.dtype or torch.float32
    if not config.architectures and config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.save_pretrained(folder)
    _copy_code(config, folder)
    _drop_attention(folder / "config.json")
    if generation_config is not None:
        # Not save_pretrained: it refuses values that the base model came with (a temperature without sampling).
        generation_config.to_json_file(folder / "generation_config.json")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def export_model(
    out: Path,
    parameters: Iterable[tuple[str, Tensor | None]],
    ranks: Ranks,
    model_config: Any,
    tokenizer: Any = None,
    generation_config: Any = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    trust_remote_code: bool = False,
) -> Path:
    """Write the live model. Collective: every rank runs through `parameters`, the first rank writes.

    Args:
        out: The folder to make; an earlier one is replaced when the new one is complete.
        parameters: Name (as in the base model) and full tensor of every parameter and persistent buffer, in the dtype
            it is to be saved in; the tensor may be None on all ranks but the first.
        ranks: Where this process stands.
        model_config, tokenizer, generation_config, dtype: As in `write_assets`.
        max_shard_bytes: Tensors are spread over files of about this size.
        trust_remote_code: `model.trust_remote_code`.
    Returns:
        The folder.
    Raises:
        CheckpointError: on every rank, if a tensor is missing, empty or has another shape, or the disk is full.
    """
    writer, error = None, None
    try:
        if ranks.is_first:
            writer = ModelWriter(out, model_config, max_shard_bytes, trust_remote_code)
            write_assets(writer.staging, model_config, tokenizer, generation_config, dtype)
    except Exception as failure:  # raised on every rank below
        error = failure
    for name, tensor in parameters:
        # After an error too: the other ranks gather, and would wait for this one.
        if writer is None or error is not None:
            continue
        try:
            writer.add(name, _present(name, tensor))
        except Exception as failure:
            error = failure
    try:
        if writer is not None and error is None:
            writer.finish()
    except Exception as failure:
        error = failure
    if writer is not None and error is not None:
        writer.discard()
    raise_together(None if error is None else explain_write_error(error, out.parent, 0))
    return out


def export_checkpoint(
    checkpoint: Path, out: Path, max_shard_bytes: int = MAX_SHARD_BYTES, trust_remote_code: bool = False
) -> Path:
    """Turn a checkpoint of any ZeRO stage and number of processes into a model folder; one process, no GPU, no network.

    Args:
        checkpoint: The folder `.../checkpoints/step-000012`.
        out: The folder to make; it must not exist, or be empty.
        max_shard_bytes, trust_remote_code: As in `export_model`.
    Returns:
        The folder `out`.
    Raises:
        ConfigError: if `out` is in use; nothing is touched.
        FolderInUseError: if another process writes it at this moment.
        CheckpointError: if the checkpoint does not verify, or does not hold the whole model.
    """
    require_unused(out, checkpoint)
    if not (checkpoint / MANIFEST_FILE).is_file() and (meant := checkpoint_meant_by(checkpoint)):
        raise CheckpointError(f"CHECKPOINT={checkpoint} is not a checkpoint; did you mean {meant}?")
    if (checkpoint / "config.json").is_file():
        raise CheckpointError(f"CHECKPOINT={checkpoint} is a model folder already; transformers loads it as it is")
    verify(checkpoint)
    assets = checkpoint / ASSETS_FOLDER
    if not (assets / "config.json").is_file():
        raise CheckpointError(f"{checkpoint}: {ASSETS_FOLDER}/config.json is missing; the model cannot be rebuilt")
    try:
        model_config: Any = AutoConfig.from_pretrained(
            assets, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise_if_own_code(error, f"CHECKPOINT={checkpoint}", "--trust-remote-code")
        raise CheckpointError(f"{assets}: its config.json cannot be used: {error}") from error
    writer = ModelWriter(out, model_config, max_shard_bytes, trust_remote_code)
    try:
        require_unused(out, checkpoint)  # another process may have written it until now; from here on none does
        for path in assets.iterdir():  # not the folder itself, which has a mode of its own
            (shutil.copytree if path.is_dir() else shutil.copy2)(path, writer.staging / path.name)
        for name, tensor in full_parameters(checkpoint, model_config.dtype or torch.float32):
            writer.add(name, tensor)
        writer.finish()
    except Exception as error:
        writer.discard()
        raise explain_write_error(error, out.parent, 0) from error
    return out


def require_unused(out: Path, checkpoint: Path) -> None:
    """A folder that is to be made must not exist, or be empty, and must not be part of what is read."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"OUT={out} exists and is not an empty folder; name a new folder")
    if checkpoint.resolve() in out.resolve().parents:
        raise ConfigError(f"OUT={out} lies inside the checkpoint; name a folder outside of it")


def _copy_code(config: Any, folder: Path) -> None:
    """Code that came with the model goes with it; transformers itself would write that of the configuration alone."""
    if getattr(config, "auto_map", None) and config.name_or_path:
        for path in Path(config.name_or_path).glob("*.py"):
            shutil.copyfile(path, folder / path.name)


def _present(name: str, tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise CheckpointError(f"{name} was not gathered on the first rank; the model was not written")
    return tensor


def _drop_attention(config_file: Path) -> None:
    """The name of our attention function means nothing to other programs; they choose their own."""
    values = json.loads(config_file.read_text(encoding="utf-8"))
    if not any(key in values for key in _ATTENTION_KEYS):
        return
    kept = {key: value for key, value in values.items() if key not in _ATTENTION_KEYS}
    config_file.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")
