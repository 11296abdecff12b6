"""Put a new adapter, or one from disk, into a loaded model.

The base is frozen and its values are not touched. The adapter is made whole on every rank from one seed, so it is the
same whatever the number of ranks; DeepSpeed partitions it when the engine is made. It has the model's dtype, since
ZeRO-3 cannot mix dtypes, and no dropout.

`all-linear` are the modules that are linear layers: experts that an architecture keeps as one stacked parameter are
none of them, and a router is one only where it is an `nn.Linear`.
"""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModelForCausalLM, get_peft_model_state_dict, set_peft_model_state_dict
from peft.config import PeftConfig
from peft.tuners.adalora import RankAllocator
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from dpo_dist.adapters.files import (
    for_creation,
    read_settings,
    read_tensors,
    require_own_layers,
)
from dpo_dist.adapters.settings import new_settings, require_prefix
from dpo_dist.config import AdapterConfig
from dpo_dist.errors import ConfigError, DpoDistError, ModelError
from dpo_dist.model.adapted import POLICY, REFERENCE, Adapter, base_name
from dpo_dist.model.recomputation import Recomputation
from dpo_dist.model.scoring import ScoringModel, sharded_loading
from dpo_dist.peers import raise_if_peer_lost
from dpo_dist.pretrained import PROMPT_LEARNING, adapter_kind, first_line, require_adapter_folder


def attach_adapter(
    model: ScoringModel,
    config: AdapterConfig,
    base_model: str,
    seed: int,
    total_steps: int | None,
    deepspeed_config: dict[str, Any],
    tokenizer: Path | str | None = None,
) -> ScoringModel:
    """Put the adapter into the model and freeze everything else. Collective under ZeRO-3.

    Args:
        model: as `load_model` gave it; it is changed.
        config: the section `adapter`; without an adapter the model is left as it is.
        base_model: what the user wrote, for the exported adapter.
        seed: of the adapter's first values.
        total_steps: updates of the run, for AdaLoRA.
        deepspeed_config: what the model was loaded with.
        tokenizer: folder or name, for `prompt_tuning_init_text`.
    Returns:
        The same model.
    Raises:
        ConfigError: a setting is not possible with this model.
        ModelError: the adapter on disk cannot be used with it.
    """
    if not config.is_used:
        return model
    kind = adapter_kind(config)
    assert kind is not None
    language_model = model.model
    dtype = language_model.dtype
    recomputes = language_model.is_activation_checkpointing
    with sharded_loading(deepspeed_config), _peft_errors(config):
        if config.adapter_name_or_path is not None:
            peft = _read(language_model, kind, config.adapter_name_or_path, seed)
        else:
            settings = new_settings(config, language_model, total_steps, tokenizer)
            peft = _create(language_model, kind, settings, seed)
    if recomputes:
        # PEFT makes the embeddings need a gradient, for a kind of recomputation that is not used here.
        language_model.disable_input_require_grads()
    for name, parameter in peft.named_parameters():
        if base_name(name) is not None:
            continue
        if type(parameter).__name__ == "Params4bit":
            raise ConfigError(
                f"adapter.lora_modules_to_save={config.lora_modules_to_save} with adapter.load_in_4bit=true: {name} "
                "is kept in 4 bits and cannot be trained whole; adapt it through adapter.lora_target_modules"
            )
        parameter.data = parameter.data.to(dtype)
    for settings in peft.peft_config.values():
        settings.base_model_name_or_path = base_model
    layers = [module for module in peft.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    allocator = RankAllocator if kind == "adalora" else None
    model.adopt(Adapter(peft, kind, base_model, REFERENCE in peft.peft_config, layers, allocator))
    return model


def require_adapter(
    config: AdapterConfig,
    model_config: PretrainedConfig,
    gradient_checkpointing: Recomputation,
    trust_remote_code: bool,
    total_steps: int | None,
    tokenizer: Path | str | None = None,
) -> None:
    """Find out whether the adapter fits the architecture, which is built without memory. Loads no model.

    Args:
        config, total_steps, tokenizer: as in `attach_adapter`.
        model_config, gradient_checkpointing, trust_remote_code: as in `load_model`.
    Raises:
        ConfigError, ModelError: as `attach_adapter`.
    """
    if not config.is_used:
        return
    with torch.device("meta"):
        language_model: Any = AutoModelForCausalLM.from_config(
            copy.deepcopy(model_config), trust_remote_code=trust_remote_code
        )
        if gradient_checkpointing is True:
            language_model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        attach_adapter(ScoringModel(language_model), config, "", 0, total_steps, {}, tokenizer)


def _create(model: PreTrainedModel, kind: str, settings: PeftConfig, seed: int) -> PeftModelForCausalLM:
    if kind == "prefix_tuning" and model.is_activation_checkpointing:
        require_prefix(model, settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft = PeftModelForCausalLM(model, settings, POLICY, autocast_adapter_dtype=False)
    if kind == "prefix_tuning":
        require_prefix(model, peft.peft_config[POLICY])
    if kind in PROMPT_LEARNING and peft.word_embeddings is not model.get_input_embeddings():
        raise ModelError(
            f"adapter.peft_type={kind} does not fit architecture {model.config.model_type}: PEFT does not find its "
            "input embeddings; use lora"
        )
    for name, parameter in peft.named_parameters():
        parameter.requires_grad_(base_name(name) is None and "ranknum" not in name.split("."))
    return peft


def _read(model: PreTrainedModel, kind: str, name: str, seed: int) -> PeftModelForCausalLM:
    """The adapter of a folder twice: one to train, and a frozen one as the reference."""
    folder, _ = require_adapter_folder(name)
    settings = read_settings(folder, name)
    require_own_layers(model, settings, name)
    peft = _create(model, kind, for_creation(settings), seed)
    encoders: Any = peft.prompt_encoder if kind in PROMPT_LEARNING else None
    expected: dict[str, Any]
    if encoders is not None:
        expected = {"prompt_embeddings": encoders[POLICY].embedding.weight}
    else:
        expected = get_peft_model_state_dict(peft, peft.state_dict(), POLICY, save_embedding_layers=False)
    tensors = read_tensors(folder, name, expected)
    if any(parameter.is_meta for parameter in peft.parameters()):
        return peft  # only asked whether it fits
    trained = {one for one, parameter in peft.named_parameters() if parameter.requires_grad}
    set_peft_model_state_dict(peft, dict(tensors), POLICY)
    peft.add_adapter(REFERENCE, _frozen(settings), autocast_adapter_dtype=False)
    set_peft_model_state_dict(peft, dict(tensors), REFERENCE)
    for one, parameter in peft.named_parameters():
        parameter.requires_grad_(one in trained)
    return peft


def _frozen(settings: Any) -> PeftConfig:
    copied = for_creation(settings)
    # Where virtual tokens are looked up by PEFT, `inference_mode` reads them past their module, which ZeRO-3 gathers.
    copied.inference_mode = not copied.is_prompt_learning
    return copied


@contextmanager
def _peft_errors(config: AdapterConfig) -> Iterator[None]:
    """What PEFT says about a configuration, as our error; its warnings are about what is decided here."""
    source = (
        f"adapter.peft_type={config.peft_type}"
        if config.adapter_name_or_path is None
        else f"adapter.adapter_name_or_path={config.adapter_name_or_path}"
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except DpoDistError:
        raise
    except (ValueError, TypeError, KeyError, RuntimeError, OSError) as error:
        raise_if_peer_lost(error)
        raise ConfigError(f"{source} does not fit this model: {first_line(error)}") from error
