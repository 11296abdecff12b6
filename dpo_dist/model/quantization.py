"""The frozen weights in 4 bits (QLoRA), and whether that is possible here."""

import importlib.util

import torch
from transformers import BitsAndBytesConfig

from dpo_dist.config import AdapterConfig
from dpo_dist.errors import ConfigError
from dpo_dist.pretrained import adapter_kind

_KEY = "adapter.load_in_4bit=true"


def four_bits(config: AdapterConfig, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """bitsandbytes' configuration; None where weights stay as they are.

    The packed weights are stored in tensors of the model's dtype, so that all parameters have one.

    Args:
        config: the section `adapter`.
        dtype: of the model.
    Raises:
        ConfigError: the package is missing, or the adapter is no `lora`.
    """
    if not config.load_in_4bit:
        return None
    kind = adapter_kind(config)
    if kind != "lora":
        raise ConfigError(f"{_KEY} goes with an adapter of kind lora only, and this one is {kind}; leave it out")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"{_KEY} needs the package bitsandbytes; install it by pip install 'dpo-dist[qlora]'")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=config.use_bnb_nested_quant,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )
