"""A trained adapter as a folder that PEFT loads, and merged into its base model as a folder that transformers loads."""

import copy
import json
import logging
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PromptEncoder
from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_dist.checkpoint.export import ASSETS_FOLDER, require_unused, write_assets
from dpo_dist.checkpoint.files import claim_staging, explain_write_error, publish, remove_path, sync, sync_folders
from dpo_dist.checkpoint.manifest import verify
from dpo_dist.checkpoint.saved_states import full_parameters
from dpo_dist.checkpoint.writer import MAX_SHARD_BYTES, ModelWriter, set_usual_mode
from dpo_dist.distributed import Ranks, raise_together
from dpo_dist.errors import CheckpointError, ConfigError, ModelError
from dpo_dist.model import Adapter
from dpo_dist.pretrained import raise_if_own_code
from dpo_dist.pretrained.adapter_folder import SETTINGS_FILE, WEIGHTS_FILE

logger = logging.getLogger(__name__)

_NAME = "default"  # the trained adapter among PEFT's
_PREFIX = "base_model.model."  # PEFT's own wrapping, part of every key


def write_adapter_settings(folder: Path, adapter: Adapter) -> None:
    """Write `adapter_config.json`, as it is now: AdaLoRA's ranks change. Also for `checkpoint/model_assets`."""
    folder.mkdir(parents=True, exist_ok=True)
    _exported_settings(adapter.config).save_pretrained(str(folder))


def export_adapter(
    out: Path,
    parameters: Iterable[tuple[str, Tensor | None]],
    ranks: Ranks,
    adapter: Adapter,
    tokenizer: Any = None,
) -> Path:
    """Write the live adapter. Collective: every rank runs through `parameters`, the first rank writes.

    Args:
        out: The folder to make; an earlier one is replaced when the new one is complete.
        parameters: What `TrainingEngine.named_adapter_parameters` gives.
        ranks: Where this process stands.
        adapter: The model's.
        tokenizer: Written beside it; None where the run has none.
    Returns:
        The folder.
    Raises:
        CheckpointError: on every rank, if a tensor is missing or empty, or the disk is full.
    """
    whole = {name: tensor for name, tensor in parameters if tensor is not None}
    error = None
    try:
        if ranks.is_first:
            _write(out, adapter.config, whole, tokenizer)
    except Exception as failure:  # raised on every rank below
        error = explain_write_error(failure, out.parent, 0)
    raise_together(error)
    return out


def export_adapter_checkpoint(checkpoint: Path, out: Path) -> Path:
    """The adapter of a checkpoint of any ZeRO stage and number of processes; one process, no GPU, no network.

    Args:
        checkpoint: The folder `.../checkpoints/step-000012` of a run with an adapter.
        out: The folder to make; it must not exist, or be empty.
    Raises:
        ConfigError: if `out` is in use; nothing is touched.
        CheckpointError: if the checkpoint does not verify, or holds no adapter.
    """
    require_unused(out, checkpoint)
    verify(checkpoint)
    assets = checkpoint / ASSETS_FOLDER
    if not (assets / SETTINGS_FILE).is_file():
        raise CheckpointError(
            f"{checkpoint}: {ASSETS_FOLDER}/{SETTINGS_FILE} is missing; it is not a checkpoint of an adapter"
        )
    settings = _settings_of(assets)
    dtype = getattr(torch, json.loads((assets / "config.json").read_text(encoding="utf-8")).get("dtype") or "float32")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(assets) if (assets / "tokenizer.json").is_file() else None
        _write(out, settings, dict(full_parameters(checkpoint, dtype)), tokenizer)
    except Exception as error:
        raise explain_write_error(error, out.parent, 0) from error
    return out


def export_merged(
    base: Path,
    adapter: Path,
    out: Path,
    dtype: torch.dtype,
    tokenizer: Any = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    trust_remote_code: bool = False,
) -> Path:
    """The base model with the adapter added to its weights. One process; holds the model in float32.

    Args:
        base: Folder of the base model, not quantised.
        adapter: What `export_adapter` wrote.
        out: The folder to make; an earlier one is replaced when the new one is complete.
        dtype: Of the written weights, which are rounded to it once.
        tokenizer, max_shard_bytes, trust_remote_code: As in `export_model`.
    Returns:
        The folder.
    Raises:
        ConfigError: if the adapter is virtual tokens, which no weight can stand for.
        ModelError: if the two do not belong together.
        CheckpointError: if the disk is full.
    """
    settings = _settings_of(adapter)
    if settings.is_prompt_learning:
        raise ConfigError(
            f"{adapter}: an adapter of type {settings.peft_type.value} consists of virtual tokens and cannot be "
            "merged into weights; export the adapter alone"
        )
    model = _merge(base, adapter, trust_remote_code)
    heads = (model.get_input_embeddings(), model.get_output_embeddings())
    if model.config.tie_word_embeddings and heads[0].weight is not heads[1].weight:
        model.config.tie_word_embeddings = False  # one of them was trained whole, or both apart
    writer = ModelWriter(out, model.config, max_shard_bytes, trust_remote_code)
    try:
        write_assets(writer.staging, model.config, tokenizer, model.generation_config, dtype)
        for name, tensor in model.state_dict().items():
            writer.add(name, tensor.to(dtype) if tensor.is_floating_point() else tensor)
        writer.finish()
    except Exception as error:
        writer.discard()
        raise explain_write_error(error, out.parent, 0) from error
    return out


def _merge(base: Path, adapter: Path, trust_remote_code: bool) -> Any:
    try:
        model = AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.float32, use_safetensors=True, trust_remote_code=trust_remote_code, local_files_only=True
        )
        with warnings.catch_warnings():
            # Missing keys are only warned of, and would leave random numbers; modules of tied weights are meant, and
            # PEFT does not know its own rank pattern again.
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
            warnings.filterwarnings("ignore", category=FutureWarning)  # of PEFT about itself
            warnings.filterwarnings("ignore", message="The following rank_pattern keys")
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            peft: Any = PeftModel.from_pretrained(model, str(adapter), autocast_adapter_dtype=False)
            return peft.merge_and_unload()
    except (OSError, ValueError, RuntimeError, KeyError, UserWarning) as error:
        raise_if_own_code(error, str(base), "--trust-remote-code")
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{adapter} cannot be merged into {base}: {reason} give the model that it was trained on"
        ) from error


def adapter_tensors(settings: Any, named: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an adapter under the keys that PEFT saves them with.

    Args:
        settings: PEFT's configuration of it.
        named: whole tensors by their names in the adapted model; what belongs to no adapter is left out.
    Raises:
        CheckpointError: a tensor is empty, or there is none.
    """
    for name, tensor in named.items():
        if tensor.numel() == 0:
            raise CheckpointError(f"{name} is empty; it was not gathered, and the adapter was not written")
    if settings.is_prompt_learning:
        return {"prompt_embeddings": _virtual_tokens(settings, named)}
    tensors = {}
    kept = {_without_name(name): torch.tensor(rows) for name, rows in (settings.rank_pattern or {}).items()}
    for name, tensor in named.items():
        parts = name.split(".")
        if "modules_to_save" in parts:
            place = parts.index("modules_to_save")
            key = ".".join([*parts[:place], *parts[place + 2 :]])
        elif any(part.startswith("lora_") for part in parts):
            key = _without_name(name)
            if "lora_magnitude_vector" in parts:
                key = key.removesuffix(".weight")
            if settings.peft_type == "ADALORA":
                tensor = _kept_ranks(key, tensor, kept)
        else:
            continue
        tensors[f"{_PREFIX}{key}"] = tensor.contiguous()
    if not tensors:
        raise CheckpointError("there is no tensor of an adapter; nothing was written")
    return tensors


def _kept_ranks(key: str, tensor: Tensor, kept: dict[str, Tensor]) -> Tensor:
    layer, _, matrix = key.rpartition(".")
    rows = kept.get(f"{layer}.lora_E")
    if rows is None:
        return tensor
    ranks = tensor.shape[1] if matrix == "lora_B" else tensor.shape[0]
    if len(rows) != ranks:
        return tensor  # an adapter that was loaded with these ranks has no others
    return tensor[:, rows] if matrix == "lora_B" else tensor[rows]


@torch.no_grad()
def _virtual_tokens(settings: Any, named: dict[str, Tensor]) -> Tensor:
    """What the encoder gives, which is all that PEFT saves of it."""
    prefix = f"prompt_encoder.{_NAME}."
    state = {name.removeprefix(prefix): tensor for name, tensor in named.items() if name.startswith(prefix)}
    if settings.peft_type != "P_TUNING":
        return state["embedding.weight"].contiguous()
    trainable = copy.deepcopy(settings)
    trainable.inference_mode = False
    encoder = PromptEncoder(trainable)
    encoder.to(next(iter(state.values())).dtype).load_state_dict(state)
    return encoder(torch.arange(settings.num_virtual_tokens)).contiguous()


def _without_name(name: str) -> str:
    return name.replace(f".{_NAME}", "")


def _exported_settings(settings: Any) -> PeftConfig:
    """As PEFT saves it: for inference, and ranks without the adapter's name; sets in an order that does not vary."""
    exported = copy.deepcopy(settings)
    exported.inference_mode = True
    for name, value in vars(exported).items():
        if isinstance(value, set):
            setattr(exported, name, sorted(value))
    if getattr(exported, "rank_pattern", None):
        exported.rank_pattern = {_without_name(name): rows for name, rows in exported.rank_pattern.items()}
    return exported


def _settings_of(folder: Path) -> Any:
    try:
        values = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
        return PEFT_TYPE_TO_CONFIG_MAPPING[values["peft_type"]].from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder}: its {SETTINGS_FILE} cannot be used: {error}") from error


def _write(out: Path, settings: Any, named: dict[str, Tensor], tokenizer: Any) -> None:
    tensors = adapter_tensors(settings, named)
    staging, held = claim_staging(out)
    try:
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        _exported_settings(settings).save_pretrained(str(staging))
        path = staging / WEIGHTS_FILE
        save_file(tensors, path, metadata={"format": "pt"})
        set_usual_mode(path)
        with safe_open(path, framework="pt") as written:
            for name, tensor in tensors.items():
                if not torch.equal(written.get_tensor(name), tensor):
                    raise CheckpointError(f"{path}: {name} reads back differently than it was written; check the disk")
        for file in sorted(staging.rglob("*")):
            if file.is_file():
                sync(file)
        sync_folders(staging)
        publish(staging, out)
        logger.info("trained adapter written to %s: %d tensors", out, len(tensors))
    except Exception:
        remove_path(staging)
        raise
    finally:
        if held is not None:
            os.close(held)
