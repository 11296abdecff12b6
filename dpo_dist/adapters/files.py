"""An adapter on disk that is gone on with: is it one, of a kind that can be trained here, and of this model."""

import copy
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

from dpo_dist.adapters.settings import require_targets
from dpo_dist.errors import ModelError
from dpo_dist.pretrained import first_line
from dpo_dist.pretrained.adapter_folder import KEY, SETTINGS_FILE, WEIGHTS_FILE, adapter_values

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


def read_settings(folder: Path, name: str) -> PeftConfig:
    """PEFT's configuration of an adapter on disk, made ready for training without dropout.

    Raises:
        ModelError: it cannot be used, or asks for something that is not supported.
    """
    values = adapter_values(folder, name)
    try:
        kind = PEFT_TYPE_TO_CONFIG_MAPPING[values["peft_type"]]
        settings: Any = kind.from_pretrained(str(folder))
    except (TypeError, ValueError, KeyError, AttributeError, OSError) as error:
        raise ModelError(f"{KEY}={name}: its {SETTINGS_FILE} cannot be used: {first_line(error)}") from None
    for field in fields(settings):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        value = getattr(settings, field.name)
        if field.name not in _FREE and value != default and value:
            raise ModelError(
                f"{KEY}={name}: {field.name}={value} of its {SETTINGS_FILE} is not supported, only "
                f"{field.name}={default}"
            )
    initial = getattr(settings, "init_lora_weights", True)
    if initial not in (True, False, "gaussian", "orthogonal", "eva"):
        raise ModelError(
            f"{KEY}={name}: init_lora_weights={initial} changes the base model's weights; convert the adapter with "
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
        require_targets(model, sorted(targets), f"{KEY}={name}: target_modules")


def read_tensors(folder: Path, name: str, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The adapter's tensors, after they have been held against what this base model needs.

    Args:
        folder, name: of the adapter.
        expected: what an adapter of this configuration on this base model consists of.
    Raises:
        ModelError: the file is damaged, or the adapter is one of another base model.
    """
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError, ValueError) as error:
        raise ModelError(f"{KEY}={name}: {WEIGHTS_FILE} is damaged ({first_line(error)}); copy it again") from None
    reason = f"{KEY}={name} is an adapter of another base model than model.model_name_or_path"
    for key in sorted(expected.keys() | tensors.keys()):
        if key not in tensors:
            raise ModelError(f"{reason}, or is not complete: it has no {key}")
        if key not in expected:
            raise ModelError(f"{reason}: its {key} belongs to no layer")
        found, needed = tuple(tensors[key].shape), tuple(expected[key].shape)
        if found != needed:
            raise ModelError(f"{reason}: its {key} has shape {found}, and this model needs {needed}")
        if not bool(torch.isfinite(tensors[key]).all()):
            raise ModelError(f"{KEY}={name}: {key} is not finite; the adapter is damaged")
    return tensors


def for_creation(settings: Any) -> PeftConfig:
    """A configuration whose adapter is made without the text or tokens that it once began with: it is read over."""
    plain = copy.deepcopy(settings)
    if hasattr(plain, "prompt_tuning_init"):
        plain.prompt_tuning_init = "RANDOM"
    return plain
