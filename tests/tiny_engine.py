"""A tiny Llama in a real DeepSpeed engine at any stage, for tests that need true shards; and its process group."""

import atexit
import functools
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType

import deepspeed
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from dpo_dist.checkpoint import RunState, save_shards, write_assets
from dpo_dist.distributed import Ranks, process_group

VOCABULARY = 67
# What DeepSpeed 0.19 and torch 2.13 say on CPU about each other.
QUIET = ("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


@functools.cache
def only_rank() -> Ranks:
    """A process group of this process alone, kept until it ends: DeepSpeed caches groups, so there can be only one."""
    stack = ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(process_group())


class Wrapper(nn.Module):
    """The language model as the attribute `model`, as the package's own wrapper has it."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids).logits


def tiny_config(tied: bool = True, layers: int = 2, hidden: int = 30) -> LlamaConfig:
    """Sizes that neither 2 nor 4 ranks divide, so that DeepSpeed has to pad."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=45,
        num_hidden_layers=layers,
        num_attention_heads=3,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )


def make_engine(
    stage: int,
    dtype: torch.dtype,
    config: LlamaConfig | None = None,
    prepare: Callable[[LlamaForCausalLM], None] = lambda model: None,
    zero: Mapping[str, int] = MappingProxyType({}),
):
    """A new engine with freshly initialised weights, the same every time; two parameter groups, as in training."""
    if not torch.distributed.is_initialized():
        only_rank()
    torch.manual_seed(0)
    wrapper = Wrapper(LlamaForCausalLM(config or tiny_config()))
    prepare(wrapper.model)
    matrices = [p for p in wrapper.parameters() if p.requires_grad and p.dim() > 1]
    vectors = [p for p in wrapper.parameters() if p.requires_grad and p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    engine, *_ = deepspeed.initialize(
        model=wrapper,
        optimizer=torch.optim.AdamW(groups, lr=1e-2),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **zero},
            "bf16": {"enabled": dtype == torch.bfloat16},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 1.0,
            "steps_per_print": None,
        },
    )
    return engine


def train(engine, steps: int, seed: int) -> list[float]:
    """Losses of a few updates on random tokens."""
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        tokens = torch.randint(0, VOCABULARY, (1, 9), generator=generator)
        loss = engine(tokens).float().logsumexp(-1).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def full_parameters_of(engine):
    """Name and whole value of each parameter of the language model; collective."""
    for name, parameter in engine.module.model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            whole = parameter.detach().cpu().clone()
        yield name, whole


def save_engine(store, engine, state: RunState, dtype: torch.dtype) -> Path:
    """A checkpoint as the trainer makes it."""
    model = engine.module.model

    def assets(folder: Path) -> None:
        write_assets(folder / "model_assets", model.config, None, model.generation_config, dtype)

    return store.save(state, lambda folder: save_shards(engine, folder), assets)
