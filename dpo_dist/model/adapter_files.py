"""An adapter on disk that is gone on with: is it one, of a kind that can be trained here, and of this model."""

import copy
import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from dpo_dist.errors import ModelError
from dpo_dist.model.adapter_settings import KINDS, require_targets
from dpo_dist.model.folder import first_line

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_KEY = "adapter.adapter_name_or_path"
# What an adapter may say for itself. Anything else must be as PEFT has it by default: it would change the base model,
# need data, or compute something that is not checked here.
_FREE = frozenset(
    "task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode r target_modules "
    "exclude_modules lora_alpha lora_dropout fan_in_fan_out use_rslora use_dora lora_bias modules_to_save "
    "init_lora_weights layers_to_transform layers_pattern rank_pattern alpha_pattern target_r init_r tinit tfinal "
    "deltaT beta1 beta2 orth_reg_weight total_step num_virtual_tokens token_dim num_transformer_submodules "
    "num_attention_heads num_layers encoder_hidden_size prompt_tuning_init prompt_tuning_init_text "
    "tokenizer_name_or_path tokenizer_kwargs init_weights qalora_group_size megatron_core loftq_config "
    "runtime_config".split()
)


def require_adapter_folder(name: str) -> tuple[Path, str]:
    """The folder of an adapter, and its kind as `adapter.peft_type` would say it. Reads no weights.

    Args:
        name: what the user wrote; a folder on disk.
    Raises:
        ModelError: it is no adapter, or none that can be trained here.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise ModelError(f"{_KEY}={name} does not exist; give the folder that PEFT's save_pretrained wrote")
    for file in (_CONFIG, _WEIGHTS):
        if not (folder / file).is_file():
            hint = "; pickled weights (adapter_model.bin) are not read" if file == _WEIGHTS else ""
            raise ModelError(f"{_KEY}={name} has no {file}; give the folder that PEFT's save_pretrained wrote{hint}")
    values = _values(folder, name)
    kind = KINDS.get(str(values.get("peft_type")))
    if kind is None:
        raise ModelError(
            f"{_KEY}={name}: an adapter of type {values.get('peft_type')} cannot be trained here; supported are "
            f"{', '.join(KINDS)}"
        )
    if values.get("task_type") != "CAUSAL_LM":
        raise ModelError(f"{_KEY}={name}: its task_type is {values.get('task_type')}; only CAUSAL_LM can be trained")
    if kind == "p_tuning" or values.get("prefix_projection"):
        raise ModelError(
            f"{_KEY}={name}: a saved {kind} adapter holds what its encoder gave, not the encoder; it cannot be "
            "trained any further. Start a new one by adapter.peft_type"
        )
    return folder, kind


def read_settings(folder: Path, name: str) -> PeftConfig:
    """PEFT's configuration of an adapter on disk, made ready for training without dropout.

    Raises:
        ModelError: it cannot be used, or asks for something that is not supported.
    """
    values = _values(folder, name)
    try:
        kind = PEFT_TYPE_TO_CONFIG_MAPPING[values["peft_type"]]
        settings: Any = kind.from_pretrained(str(folder))
    except (TypeError, ValueError, KeyError, AttributeError, OSError) as error:
        raise ModelError(f"{_KEY}={name}: its {_CONFIG} cannot be used: {first_line(error)}") from None
    for field in fields(settings):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        value = getattr(settings, field.name)
        if field.name not in _FREE and value != default and value:
            raise ModelError(
                f"{_KEY}={name}: {field.name}={value} of its {_CONFIG} is not supported, only {field.name}={default}"
            )
    initial = getattr(settings, "init_lora_weights", True)
    if initial not in (True, False, "gaussian", "orthogonal", "eva"):
        raise ModelError(
            f"{_KEY}={name}: init_lora_weights={initial} changes the base model's weights; convert the adapter with "
            "PEFT's path_initial_model_for_weight_conversion first"
        )
    if hasattr(settings, "init_lora_weights"):
        settings.init_lora_weights = True  # its values are read over
    if hasattr(settings, "lora_dropout"):
        settings.lora_dropout = 0.0
    settings.inference_mode = False
    return settings


def require_own_layers(model: PreTrainedModel, settings: Any, name: str) -> None:
    """The layers of a loaded adapter must exist in this model, and must not be the output head.

    Raises:
        ModelError: naming one.
    """
    targets = getattr(settings, "target_modules", None)
    if isinstance(targets, set | list):
        require_targets(model, sorted(targets), f"{_KEY}={name}: target_modules")


def read_tensors(folder: Path, name: str, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The adapter's tensors, after they have been held against what this base model needs.

    Args:
        folder, name: of the adapter.
        expected: what an adapter of this configuration on this base model consists of.
    Raises:
        ModelError: the file is damaged, or the adapter is one of another base model.
    """
    try:
        tensors = load_file(folder / _WEIGHTS)
    except (OSError, SafetensorError, ValueError) as error:
        raise ModelError(f"{_KEY}={name}: {_WEIGHTS} is damaged ({first_line(error)}); copy it again") from None
    reason = f"{_KEY}={name} is an adapter of another base model than model.model_name_or_path"
    for key in sorted(expected.keys() | tensors.keys()):
        if key not in tensors:
            raise ModelError(f"{reason}, or is not complete: it has no {key}")
        if key not in expected:
            raise ModelError(f"{reason}: its {key} belongs to no layer")
        found, needed = tuple(tensors[key].shape), tuple(expected[key].shape)
        if found != needed:
            raise ModelError(f"{reason}: its {key} has shape {found}, and this model needs {needed}")
        if not bool(torch.isfinite(tensors[key]).all()):
            raise ModelError(f"{_KEY}={name}: {key} is not finite; the adapter is damaged")
    return tensors


def for_creation(settings: Any) -> PeftConfig:
    """A configuration whose adapter is made without the text or tokens that it once began with: it is read over."""
    plain = copy.deepcopy(settings)
    if hasattr(plain, "prompt_tuning_init"):
        plain.prompt_tuning_init = "RANDOM"
    return plain


def _values(folder: Path, name: str) -> dict[str, Any]:
    try:
        values = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{_KEY}={name}: its {_CONFIG} is damaged ({first_line(error)}); copy it again") from None
    if not isinstance(values, dict):
        raise ModelError(f"{_KEY}={name}: its {_CONFIG} holds no settings; give the folder PEFT wrote")
    return values
