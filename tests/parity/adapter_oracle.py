"""Plain torch and plain PEFT: one sequence at a time, naive DPO, AdamW."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.parity.adapter_cases import (
    BETA,
    EPSILON,
    LEARNING_RATE,
    SEED,
    STEPS,
    WEIGHT_DECAY,
    Case,
    examples_of_step,
    pairs_of_step,
)

FILE = "adapter_model.safetensors"


def token_logits(model: Any, prompt: tuple[int, ...], completion: tuple[int, ...]) -> Tensor:
    ids = torch.tensor([[*prompt, *completion]])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    return logits[-len(completion) - 1 : -1]  # virtual tokens may stand in front


def token_logps(model: Any, prompt: tuple[int, ...], completion: tuple[int, ...]) -> Tensor:
    rows = token_logits(model, prompt, completion).log_softmax(-1)
    return rows[torch.arange(len(completion)), torch.tensor(completion)]


def logps_of(model: Any, example: Any) -> Tensor:
    return torch.stack([token_logps(model, example.prompt_ids, ids).sum() for ids in example.completion_ids])


def plain(folder: Path, quantised: Any = None) -> Any:
    options = {} if quantised is None else {"quantization_config": quantised}
    options |= {"dtype": torch.float32, "attn_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    for module in model.modules():
        # On CPUs with AVX512-BF16 bitsandbytes has another kernel for eval, which these narrow layers do not fit.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def build(case: Case, folder: Path) -> tuple[Any, Any]:
    """What is trained, and its reference."""
    base = folder / case.base
    if case.start is None:
        torch.manual_seed(SEED)
        model = get_peft_model(plain(base, case.quantised), case.peft(), autocast_adapter_dtype=False)
        return model, plain(base, case.quantised)
    start = folder / f"start-{case.start}"
    reference = PeftModel.from_pretrained(plain(base), str(start), autocast_adapter_dtype=False)
    if not reference.peft_config["default"].is_prompt_learning:
        config = LoraConfig.from_pretrained(str(start))
        config.lora_dropout = 0.0
        options = {"is_trainable": True, "config": config, "autocast_adapter_dtype": False}
        return PeftModel.from_pretrained(plain(base), str(start), **options), reference
    model = get_peft_model(plain(base), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    model.prompt_encoder["default"].embedding.weight.data.copy_(load_file(start / FILE)["prompt_embeddings"])
    return model, reference


def train(case: Case, folder: Path) -> tuple[list[dict[str, float]], Any]:
    """Loss and gradient norm of every step, and the trained PEFT model."""
    model, reference = build(case, folder)
    model.train()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for _, p in trained if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for _, p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=LEARNING_RATE, eps=EPSILON)
    history = []
    for step in range(STEPS):
        optimizer.zero_grad()
        total = 0.0
        for example in examples_of_step(step):
            with torch.no_grad():
                ref = logps_of(reference, example)
            ratios = logps_of(model, example) - ref
            margins = torch.stack([ratios[p.chosen] - ratios[p.rejected] for p in example.pairs])
            loss = -F.logsigmoid(BETA * margins).sum() / pairs_of_step(step)
            loss.backward()
            total += loss.item()
        if model.peft_config["default"].peft_type == "ADALORA":
            penalty(model, model.peft_config["default"].orth_reg_weight).backward()
        norm = torch.nn.utils.clip_grad_norm_([p for _, p in trained], case.max_norm)
        optimizer.step()
        if model.peft_config["default"].peft_type == "ADALORA":
            model.base_model.update_and_allocate(step + 1)
            if step == STEPS - 3:
                model.averages = dict(model.base_model.rankallocator.exp_avg_ipt)
        history.append({"loss": total, "grad_norm": norm.item()})
    return history, model


def penalty(model: Any, weight: float) -> Tensor:
    """What AdaLoraModel.forward adds to a loss."""
    terms = []
    for name, p in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            square = p @ p.T if "lora_A" in name else p.T @ p
            terms.append(torch.norm(square - torch.eye(len(square)), p="fro"))
    return weight * torch.stack(terms).mean()
