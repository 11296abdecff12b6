"""The section `adapter`."""

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from dpo_dist.config.section import Flag, Number, Section, Text, one_or_many


class AdapterConfig(Section):
    """Train a small addition to frozen weights (PEFT) instead of all weights."""

    peft_type: Literal["lora", "adalora", "prefix_tuning", "prompt_tuning", "p_tuning"] | None = None
    """Kind of adapter. `lora`, `adalora`: low-rank additions to linear layers; `prefix_tuning`, `prompt_tuning`,
    `p_tuning`: virtual tokens before every prompt. null: all weights are
    trained, unless adapter_name_or_path is given."""
    adapter_name_or_path: Text | None = None
    """Folder of an adapter to continue training; kind and sizes are what its own adapter_config.json says. A frozen
    copy of it on the same weights is the reference. null: a new adapter."""
    lora_r: Annotated[int, Field(ge=1)] = 16
    """Rank of `lora`."""
    lora_alpha: Annotated[Number, Field(gt=0)] = 32
    """Scale of `lora` and `adalora`: the addition is multiplied by lora_alpha / rank."""
    lora_target_modules: Annotated[
        Annotated[Literal["all-linear"], Tag("one")] | Annotated[list[Text], Tag("many")], Discriminator(one_or_many)
    ] = "all-linear"
    """Linear layers of the decoder that get an addition (`lora`, `adalora`), by the ends of their names, or all."""
    lora_modules_to_save: list[Text] = []
    """Modules that are trained whole beside `lora` or `adalora`, by the ends of their names (embed_tokens, lm_head)."""
    use_rslora: Flag = False
    """`lora`: scale by lora_alpha / sqrt(rank)."""
    use_dora: Flag = False
    """`lora`: train magnitude and direction of a layer's weights apart (DoRA)."""
    load_in_4bit: Flag = False
    """Keep the frozen weights in 4 bits (QLoRA; `lora` only). Needs the package bitsandbytes."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """Format of load_in_4bit."""
    use_bnb_nested_quant: Flag = False
    """Quantise the scales of load_in_4bit, too."""
    init_r: Annotated[int, Field(ge=1)] = 12
    """`adalora`: rank of every layer at the beginning."""
    target_r: Annotated[int, Field(ge=1)] = 8
    """`adalora`: mean rank at the end."""
    tinit: Annotated[int, Field(ge=0)] = 0
    """`adalora`: updates before ranks are taken away."""
    tfinal: Annotated[int, Field(ge=0)] = 0
    """`adalora`: updates at the end in which ranks stay as they are."""
    deltaT: Annotated[int, Field(ge=1)] = 1
    """`adalora`: updates between two allocations of ranks."""
    orth_reg_weight: Annotated[Number, Field(ge=0)] = 0.5
    """`adalora`: weight of the penalty on singular vectors that are not orthogonal, added to the loss."""
    total_step: Annotated[int, Field(ge=1)] | None = None
    """`adalora`: updates over which ranks are allocated. null: train.max_steps."""
    num_virtual_tokens: Annotated[int, Field(ge=1)] = 20
    """Virtual tokens of `prefix_tuning`, `prompt_tuning`, `p_tuning`."""
    encoder_hidden_size: Annotated[int, Field(ge=1)] | None = None
    """Width of the encoder of `p_tuning` (an MLP). null: the model's."""
    prompt_tuning_init_text: Text | None = None
    """Text whose embeddings the virtual tokens of `prompt_tuning` start from. null: embeddings of random tokens."""

    @property
    def is_used(self) -> bool:
        """Whether an adapter is trained, and not all weights."""
        return self.peft_type is not None or self.adapter_name_or_path is not None
