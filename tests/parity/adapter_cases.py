"""What the adapter tests train: a tiny model, a few examples, and every kind of adapter."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from dpo_dist.config import AdapterConfig
from dpo_dist.data import Pair
from dpo_dist.tokenization import TokenizedExample

SEED, BETA, STEPS, EXAMPLES = 7, 0.3, 5, 4
LEARNING_RATE, WEIGHT_DECAY, MAX_NORM = 5e-3, 0.01, 1.0
# With AdamW's usual epsilon rounding decides how far a weight moves whose gradient is almost 0.
EPSILON = 1e-3
VOCABULARY = 67
TASK = {"task_type": "CAUSAL_LM"}


@dataclass(frozen=True)
class Case:
    """One kind of adapter, as the package is told and as PEFT is told."""

    adapter: dict[str, Any]
    peft: Any  # makes PEFT's configuration
    tied: bool = False
    max_norm: float = MAX_NORM
    checkpoints: bool = False  # activations are recomputed
    quantised: BitsAndBytesConfig | None = None  # how the plain model is loaded
    start: str | None = None  # the case whose kind of adapter lies on disk already, with random values

    def config_in(self, folder: Path) -> AdapterConfig:
        if self.start is not None:
            return AdapterConfig(adapter_name_or_path=str(folder / f"start-{self.start}"))
        return AdapterConfig(**self.adapter)

    @property
    def base(self) -> str:
        return "tied" if self.tied else "base"


LORA: dict[str, Any] = {"peft_type": "lora", "lora_r": 3, "lora_alpha": 5}
PLAIN_LORA: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", **TASK}
ADALORA: dict[str, Any] = {"init_r": 5, "target_r": 2, "tinit": 1, "tfinal": 1, "deltaT": 1, "orth_reg_weight": 0.5}

CASES = {
    "lora": Case(LORA, lambda: LoraConfig(**PLAIN_LORA)),
    "rslora": Case(LORA | {"use_rslora": True}, lambda: LoraConfig(**PLAIN_LORA, use_rslora=True)),
    "dora": Case(LORA | {"use_dora": True}, lambda: LoraConfig(**PLAIN_LORA, use_dora=True), checkpoints=True),
    "saved_modules": Case(
        LORA
        | {"lora_modules_to_save": ["embed_tokens", "lm_head", "norm"], "lora_target_modules": ["q_proj", "up_proj"]},
        lambda: LoraConfig(
            **PLAIN_LORA | {"target_modules": ["q_proj", "up_proj"]},
            modules_to_save=["embed_tokens", "lm_head", "norm"],
        ),
    ),
    "tied_embedding": Case(
        LORA | {"lora_modules_to_save": ["embed_tokens"], "lora_target_modules": ["v_proj"]},
        lambda: LoraConfig(**PLAIN_LORA | {"target_modules": ["v_proj"]}, modules_to_save=["embed_tokens"]),
        tied=True,
    ),
    "tied_both": Case(
        LORA | {"lora_modules_to_save": ["embed_tokens", "lm_head"], "lora_target_modules": ["v_proj"]},
        lambda: LoraConfig(**PLAIN_LORA | {"target_modules": ["v_proj"]}, modules_to_save=["embed_tokens", "lm_head"]),
        tied=True,
    ),
    "adalora": Case(
        {"peft_type": "adalora", "lora_alpha": 300, **ADALORA},
        lambda: AdaLoraConfig(lora_alpha=300, target_modules="all-linear", total_step=STEPS, **ADALORA, **TASK),
        max_norm=0.2,
    ),
    "prefix_tuning": Case(
        {"peft_type": "prefix_tuning", "num_virtual_tokens": 3},
        lambda: PrefixTuningConfig(num_virtual_tokens=3, **TASK),
    ),
    "prompt_tuning": Case(
        {"peft_type": "prompt_tuning", "num_virtual_tokens": 3},
        lambda: PromptTuningConfig(num_virtual_tokens=3, prompt_tuning_init="SAMPLE_VOCAB", **TASK),
    ),
    "p_tuning": Case(
        {"peft_type": "p_tuning", "num_virtual_tokens": 3, "encoder_hidden_size": 11},
        lambda: PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=11, encoder_dropout=0.0, **TASK),
        checkpoints=True,
    ),
}
QUANTISED = {"bnb_4bit_quant_type": "fp4", "load_in_4bit": True}
CASES["four_bits"] = Case(
    LORA | QUANTISED | {"use_bnb_nested_quant": True},
    CASES["lora"].peft,
    quantised=BitsAndBytesConfig(bnb_4bit_use_double_quant=True, bnb_4bit_quant_storage=torch.float32, **QUANTISED),
)
CASES["continued"] = Case({}, None, start="saved_modules")
CASES["continued_dora"] = Case({}, None, start="dora")
CASES["continued_prompt"] = Case({}, None, start="prompt_tuning")
NO_MERGE = ("prefix_tuning", "prompt_tuning", "p_tuning", "continued_prompt", "four_bits")
STARTS = ("saved_modules", "dora", "prompt_tuning")


def save_base(folder: Path, tied: bool, intermediate: int = 34) -> Path:
    """Two layers, four query heads on two key/value heads, sizes that two ranks have to pad."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=20,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        tie_word_embeddings=tied,
        initializer_range=0.25,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def save_start(folder: Path, name: str) -> Path:
    """An adapter with random values as PEFT writes it, with a dropout that is not to act."""
    model = AutoModelForCausalLM.from_pretrained(folder / CASES[name].base, dtype=torch.float32)
    config = CASES[name].peft()
    if hasattr(config, "lora_dropout"):
        config.lora_dropout = 0.5
    torch.manual_seed(3)
    peft = get_peft_model(model, config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    peft.save_pretrained(str(folder / f"start-{name}"), save_embedding_layers=False)
    return folder / f"start-{name}"


def examples_of_step(step: int) -> list[TokenizedExample]:
    """Short examples; one with three completions and two pairs."""
    generator = random.Random(step)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(generator.randrange(VOCABULARY) for _ in range(generator.randint(low, high)))

    examples = []
    for number in range(EXAMPLES):
        count = 3 if number == 1 else 2
        pairs = tuple(Pair(k, k + 1) for k in range(count - 1))
        completions = tuple(ids(1, 6) for _ in range(count))
        examples.append(TokenizedExample(ids(2, 6), completions, pairs, f"step{step}:{number}"))
    return examples


def pairs_of_step(step: int) -> int:
    return sum(len(example.pairs) for example in examples_of_step(step))


def steps() -> Iterator[list[TokenizedExample]]:
    for step in range(STEPS):
        yield examples_of_step(step)
