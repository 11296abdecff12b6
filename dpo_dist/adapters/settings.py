"""PEFT's configuration of a new adapter, and whether it fits the model."""

from pathlib import Path
from typing import Any

from peft import AdaLoraConfig, LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, TaskType
from peft.config import PeftConfig
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dpo_dist.config import AdapterConfig
from dpo_dist.errors import ConfigError, ModelError


def new_settings(
    config: AdapterConfig, model: PreTrainedModel, total_steps: int | None, tokenizer: Path | str | None
) -> PeftConfig:
    """PEFT's configuration of the adapter that the section `adapter` describes. No dropout, no biases.

    Args:
        config: whose `peft_type` is given.
        model: to put it into, with the head already replaced.
        total_steps: updates of the run, for AdaLoRA's schedule.
        tokenizer: for `prompt_tuning_init_text`.
    Raises:
        ConfigError: a setting is not possible, or names no layer of this model.
    """
    common: dict[str, Any] = {"task_type": TaskType.CAUSAL_LM}
    kind = config.peft_type
    if kind == "prefix_tuning":
        return PrefixTuningConfig(num_virtual_tokens=config.num_virtual_tokens, **common)
    if kind == "p_tuning":
        width = config.encoder_hidden_size or model.config.get_text_config().hidden_size
        return PromptEncoderConfig(
            num_virtual_tokens=config.num_virtual_tokens, encoder_hidden_size=width, encoder_dropout=0.0, **common
        )
    if kind == "prompt_tuning":
        return PromptTuningConfig(num_virtual_tokens=config.num_virtual_tokens, **common, **_text(config, tokenizer))
    whole = list(config.lora_modules_to_save)
    targets = config.lora_target_modules
    require_targets(model, targets, "adapter.lora_target_modules")
    require_whole(model, targets, whole)
    common |= {
        "lora_alpha": config.lora_alpha,
        "lora_dropout": 0.0,
        "target_modules": targets if targets == "all-linear" else list(targets),
        "modules_to_save": whole or None,
        "bias": "none",
    }
    if kind == "adalora":
        return AdaLoraConfig(**common, **_schedule(config, total_steps))
    return LoraConfig(r=config.lora_r, use_rslora=config.use_rslora, use_dora=config.use_dora, **common)


def _text(config: AdapterConfig, tokenizer: Path | str | None) -> dict[str, Any]:
    if config.prompt_tuning_init_text is None:
        return {"prompt_tuning_init": "SAMPLE_VOCAB"}
    if tokenizer is None:
        raise ConfigError(
            f"adapter.prompt_tuning_init_text={config.prompt_tuning_init_text!r} needs a tokenizer, and the model has "
            "none; give model.tokenizer_name_or_path, or leave the text out"
        )
    return {
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": config.prompt_tuning_init_text,
        "tokenizer_name_or_path": str(tokenizer),
    }


def _schedule(config: AdapterConfig, total_steps: int | None) -> dict[str, Any]:
    total = config.total_step or total_steps
    assert total is not None, "the caller knows the run's number of updates"
    if config.init_r <= config.target_r:
        raise ConfigError(
            f"adapter.init_r={config.init_r} must be larger than adapter.target_r={config.target_r}: AdaLoRA begins "
            "with more ranks than it keeps"
        )
    if config.tinit >= total - config.tfinal:
        raise ConfigError(
            f"adapter.tinit={config.tinit} and adapter.tfinal={config.tfinal} leave none of the {total} updates to "
            "take ranks away in; lower them, or raise adapter.total_step or train.max_steps"
        )
    names = ("init_r", "target_r", "tinit", "tfinal", "deltaT", "orth_reg_weight")
    return {"total_step": total, **{name: getattr(config, name) for name in names}}


def require_targets(model: PreTrainedModel, targets: Any, key: str) -> None:
    """Every name must be the end of a linear layer's name, and of nothing else.

    Raises:
        ConfigError: naming some that exist.
    """
    if targets == "all-linear":
        return
    modules = dict(model.named_modules())
    head = model.get_output_embeddings()
    if not targets:
        raise ConfigError(f"{key}=[] names no layers; use all-linear, or some of {_linear_names(model)}")
    for target in targets:
        found = {name: module for name, module in modules.items() if _ends(name, target)}
        if not found:
            raise ConfigError(f"{key}={target} matches no layer of this model; it has {_linear_names(model)}")
        if any(module is head for module in found.values()):
            raise ConfigError(
                f"{key}={target} is the output head, whose log-probabilities are computed chunk by chunk from its own "
                "weights, without an adapter; train it in full through adapter.lora_modules_to_save"
            )
        for name, module in found.items():
            if not isinstance(module, nn.Linear | Conv1D):
                raise ConfigError(
                    f"{key}={target} matches {name}, a {type(module).__name__} and no linear layer; use some of "
                    f"{_linear_names(model)}"
                )


def require_whole(model: PreTrainedModel, targets: Any, whole: list[str]) -> None:
    """Every name must be the end of some module's name, and hold no layer that gets an addition as well.

    Raises:
        ConfigError: naming some that exist.
    """
    modules = dict(model.named_modules())
    for module_name in whole:
        key = f"adapter.lora_modules_to_save={module_name}"
        # As PEFT looks for them: any end of a name, also within a word.
        found = [name for name in modules if name.endswith(module_name)]
        if not found:
            names = sorted({name.rsplit(".", 1)[-1] for name, module in modules.items() if _owns_weights(module)})
            raise ConfigError(f"{key} matches no module of this model; it has {', '.join(names)}")
        for name in found:
            if isinstance(modules[name], nn.ModuleList | nn.ModuleDict):
                raise ConfigError(f"{key} matches {name}, which is a list of modules; name its members")
            if model.get_decoder() is modules[name]:
                raise ConfigError(f"{key} is the whole decoder; train all weights instead, by adapter.peft_type=null")
            inner = [inner for inner in modules if inner == name or inner.startswith(f"{name}.")]
            both = [one for one in inner if _is_target(model, modules[one], one, targets)]
            if both:
                raise ConfigError(
                    f"{key} is trained whole, and {both[0]} in it gets an adapter through "
                    "adapter.lora_target_modules; a layer can have one of the two"
                )


def _is_target(model: PreTrainedModel, module: nn.Module, name: str, targets: Any) -> bool:
    if targets == "all-linear":
        return isinstance(module, nn.Linear | Conv1D) and module is not model.get_output_embeddings()
    return any(_ends(name, target) for target in targets)


def require_prefix(model: PreTrainedModel, settings: Any) -> None:
    """What prefix tuning puts before a layer's keys and values must have their shape, and must not get lost.

    Raises:
        ConfigError: gradient checkpointing is on.
        ModelError: keys and values are not what PEFT takes them for.
    """
    if model.is_activation_checkpointing:
        raise ConfigError(
            "model.gradient_checkpointing=true does not go with adapter.peft_type=prefix_tuning: transformers drops "
            "the keys and values of the virtual tokens where activations are recomputed; set "
            "model.gradient_checkpointing=false"
        )
    text: Any = model.config.get_text_config()
    latent, value_dim = getattr(text, "qk_head_dim", None), getattr(text, "v_head_dim", None)
    head_dim = latent or getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    made = (settings.num_attention_heads, settings.token_dim // settings.num_attention_heads)
    if made != (heads, head_dim) or value_dim not in (None, head_dim):
        raise ModelError(
            f"adapter.peft_type=prefix_tuning does not fit architecture {text.model_type}: PEFT makes keys and values "
            f"of {made[0]} heads of {made[1]}, and the layers have {heads} heads of {head_dim}; use prompt_tuning, "
            "p_tuning or lora"
        )


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _owns_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def _linear_names(model: PreTrainedModel) -> str:
    linear = (nn.Linear, Conv1D)
    return ", ".join(sorted({name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, linear)}))
