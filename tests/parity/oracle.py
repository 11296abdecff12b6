"""What the parity tests hold the package against: the stock model, one sequence at a time, naive formulas.

Nothing here packs, shares, chunks or recomputes; nothing of the package is used but to build what is tested.
"""

import random
from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from dpo_dist.attention.interface import register
from dpo_dist.batch import MicroBatch, build_micro_batch
from dpo_dist.data import Pair
from dpo_dist.model import ScoringModel
from dpo_dist.tokenization import TokenizedExample

VOCABULARY = 67
# Large weights: with the usual 0.02 attention is nearly uniform, and a token seen too much would hardly show.
INITIALIZER_RANGE = 0.25


def llama_config(tied: bool = False) -> LlamaConfig:
    """Two layers, four query heads on two key/value heads."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        initializer_range=INITIALIZER_RANGE,
        max_position_embeddings=512,
    )


def stock_and_ours(
    config: PretrainedConfig, dtype: torch.dtype = torch.float64, backend: str = "sdpa", stock_attention: str = "eager"
) -> tuple[PreTrainedModel, ScoringModel]:
    """The same random weights as a stock model and as the package's."""
    torch.manual_seed(0)
    stock = AutoModelForCausalLM.from_config(deepcopy(config), attn_implementation=stock_attention, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            # Vectors start as exact ones and zeros, which would hide a forgotten norm, bias or sink.
            if parameter.dim() < 2 or name.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    ours = AutoModelForCausalLM.from_config(deepcopy(config), attn_implementation=register(backend), dtype=dtype)
    ours.load_state_dict(stock.state_dict())
    return stock, ScoringModel(ours.eval())


def with_exact_norms(model: nn.Module) -> nn.Module:
    """Llama's norm rounds to float32 inside; in a float64 comparison that would be the only error."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LlamaRMSNorm):
                norm = nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon, dtype=child.weight.dtype)
                norm.weight = child.weight
                setattr(module, name, norm)
    return model


def naive_logits(model: PreTrainedModel, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
    """The logits that each completion token is drawn by, from one plain forward over prompt + completion."""
    ids = torch.tensor([[*prompt, *completion]])
    logits = model(input_ids=ids, use_cache=False).logits[0]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    first = len(prompt) - 1  # the position that predicts the completion's first token
    return logits[first : first + len(completion)]


def naive_token_logps(model: PreTrainedModel, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
    """log softmax(logits)[target] of each completion token."""
    rows = naive_logits(model, prompt, completion).log_softmax(-1)
    return rows[torch.arange(len(completion)), torch.tensor(completion)]


def naive_statistics(logits: Tensor, targets: Tensor) -> Tensor:
    """Entropy, mean logit, whether the target is the argmax, and log sum p^2, a row of each."""
    return torch.stack(
        [
            torch.distributions.Categorical(logits=logits, validate_args=False).entropy(),  # it refuses empty ones
            logits.mean(-1),
            (logits.argmax(-1) == targets).to(logits.dtype),
            (2 * logits).logsumexp(-1) - 2 * logits.logsumexp(-1),
        ]
    )


def naive_logps(model: PreTrainedModel, examples: Sequence[TokenizedExample]) -> Tensor:
    """log pi(completion | prompt) of every completion of every example, in order."""
    return torch.stack(
        [naive_token_logps(model, e.prompt_ids, ids).sum() for e in examples for ids in e.completion_ids]
    )


def packed(examples: Sequence[TokenizedExample], share: bool) -> MicroBatch:
    """All examples in one micro-batch."""
    offsets, total = [], 0
    for example in examples:
        offsets.append(total)
        total += len(example.completion_ids)
    return build_micro_batch(examples, offsets, share)


def our_logps(model: ScoringModel, examples: Sequence[TokenizedExample], share: bool) -> Tensor:
    """The package's log-probability of every completion, from one packed forward."""
    batch = packed(examples, share)
    return batch.completion_sums(model(batch))


def objective(logps: Tensor) -> Tensor:
    """A smooth function with another gradient for every completion: random weights, curvature, and products."""
    weights = torch.randn(len(logps), generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(logps.dtype)
    scaled = logps / 10
    return (weights * scaled).sum() + (weights * scaled.tanh()).sum() + 0.1 * (scaled * scaled.roll(1)).sum()


def gradients(model: nn.Module, value: Tensor) -> dict[str, Tensor]:
    """d value / d parameter by the parameter's name in the stock model."""
    model.zero_grad(set_to_none=True)
    value.backward()
    return {
        name.removeprefix("model.") if isinstance(model, ScoringModel) else name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def random_example(
    seed: int, prompt: int, completions: Sequence[int], tokens: Sequence[int] = range(1, VOCABULARY)
) -> TokenizedExample:
    """An example of the given lengths, its pairs neighbours in the order of completions."""
    draw = random.Random(seed)
    return TokenizedExample(
        prompt_ids=tuple(draw.choices(tokens, k=prompt)),
        completion_ids=tuple(tuple(draw.choices(tokens, k=length)) for length in completions),
        pairs=tuple(Pair(i, i + 1) for i in range(len(completions) - 1)),
        source=f"random:{seed}",
    )
