"""A micro-batch of an 8B model in bfloat16 through flash-attn's real Python interface, on the meta device.

    python -m tests.gpu_contract.meta_worker OUT.json FAULT...

Shapes, dtypes and devices are real and nothing is computed; the CUDA extension is an empty module. OUT gets what the
forward and backward pass did: calls, copies to the device, tensors of another device, gradients, host time; and
once more for every FAULT, a mistake that this must show.
"""

import json
import sys
import time
import types
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from tests.gpu_contract.interpreted import PACKAGES

sys.path.append(str(PACKAGES))
sys.modules["flash_attn_2_cuda"] = types.ModuleType("flash_attn_2_cuda")

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from dpo_dist.attention.interface import register  # noqa: E402
from dpo_dist.batch import MicroBatch  # noqa: E402
from dpo_dist.logprobs import STATISTICS  # noqa: E402
from dpo_dist.model import ScoringModel  # noqa: E402
from tests.gpu_contract.shapes import LLAMA_8B  # noqa: E402
from tests.parity.oracle import packed, random_example  # noqa: E402

META = torch.device("meta")
EXAMPLES = [random_example(i, 500 + 10 * i, [300 + 7 * i, 250 - 9 * i]) for i in range(8)]
REPEATS = 3


class Recorder(TorchDispatchMode):
    """Counts operators, and notes every tensor that is on another device than the model."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.strangers: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self.flash_dtypes: set[str] = set()

    def __torch_dispatch__(self, operator: Any, kinds: Any, arguments: Any = (), settings: Any = None) -> Any:
        result = operator(*arguments, **(settings or {}))
        name = f"{operator.namespace}.{operator._opname}"
        self.calls[name] += 1
        tensors = [leaf for leaf in tree_leaves((arguments, settings)) if isinstance(leaf, Tensor)]
        moved = isinstance(result, Tensor) and any(tensor.device != result.device for tensor in tensors)
        if moved and name in ("aten._to_copy", "aten.copy_"):
            self.copies[f"{tensors[-1].device.type} to {result.device.type}"] += 1
        elif any(tensor.device != META for tensor in tensors):
            self.strangers[name] += 1
        if name.startswith("flash_attn."):
            self.flash_dtypes |= {str(tensor.dtype) for tensor in tensors if tensor.dim() == 3}
        return result


def build(recompute: bool) -> ScoringModel:
    """The model without memory for its weights."""
    with META:
        model = AutoModelForCausalLM.from_config(
            LLAMA_8B, attn_implementation=register("flash_attn"), dtype=torch.bfloat16
        ).train()
    if recompute:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return ScoringModel(model)


def move(batch: MicroBatch, fault: str | None) -> MicroBatch:
    """The micro-batch on the device, with a mistake if one is to be planted."""
    if fault == "field by field":
        tensors = {name: value.to(META) for name, value in vars(batch).items() if isinstance(value, Tensor)}
        of_layout = {name: value.to(META) for name, value in vars(batch.layout).items() if isinstance(value, Tensor)}
        return replace(batch, layout=replace(batch.layout, **of_layout), **tensors)
    moved = batch.to(META)
    if fault == "careless":
        torch.zeros(1).to(META)
    return replace(moved, position_ids_T=batch.position_ids_T) if fault == "positions on the host" else moved


def careless(model: ScoringModel, batch: MicroBatch) -> Tensor:
    """A forward pass with mistakes that stop nothing, and of which each must show."""
    model.model.get_decoder().embed_tokens.requires_grad_(False)
    with torch.no_grad():
        model(batch)  # kernels are called twice as often
    weight = torch.ones(()) + torch.ones(1).to(META)[0]  # a number on the host, and a copy in the middle
    return model(batch) * weight


def observe(recompute: bool, fault: str | None, statistics: tuple[str, ...] = ()) -> dict[str, Any]:
    """One micro-batch forward and backward."""
    model, host_batch = build(recompute), packed(EXAMPLES, share=True)
    if fault == "float32 weights":
        model.float()
    with Recorder() as moving:
        batch = move(host_batch, fault)
    with Recorder() as running:
        try:
            answer = careless(model, batch) if fault == "careless" else model(batch, statistics)
            logps_M, *rest = answer if statistics else (answer,)
            logps_M.sum().backward()
        except (RuntimeError, AssertionError) as error:
            return {"error": f"{type(error).__name__}: {error}"}
    return {
        "tokens": len(batch.input_ids_T),
        "scored": [len(batch.target_ids_M), *logps_M.shape],
        "dtype": str(logps_M.dtype),
        "statistics": [[list(one.shape), str(one.dtype), one.device.type, one.requires_grad] for one in rest],
        "matrix_products": running.calls["aten.mm"],
        "copies": dict(moving.copies),
        "strangers": dict(running.strangers),
        "copies_inside": dict(running.copies),
        "forward_calls": running.calls["flash_attn._flash_attn_varlen_forward"],
        "backward_calls": running.calls["flash_attn._flash_attn_varlen_backward"],
        "flash_dtypes": sorted(running.flash_dtypes),
        "wrong_gradients": [
            name
            for name, p in model.named_parameters()
            if p.grad is None or (p.grad.shape, p.grad.dtype, p.grad.device) != (p.shape, p.dtype, p.device)
        ],
        "host_seconds": None if fault else host_seconds(model, batch),
    }


def host_seconds(model: ScoringModel, batch: MicroBatch) -> float:
    """Python and dispatch of one forward and backward, the median of some: a GPU that is faster would wait for it."""
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        model(batch).sum().backward()
        seconds.append(time.perf_counter() - started)
    return median(seconds)


def main() -> None:
    """With and without recomputation, asked for statistics, and with each fault."""
    torch.cuda.get_device_capability = lambda device=None: (8, 0)  # type: ignore[assignment]
    out, *faults = sys.argv[1:]
    results = {name: observe(name == "recompute", None) for name in ("keep", "recompute")}
    results["statistics"] = observe(False, None, STATISTICS)
    results |= {fault: observe(recompute=False, fault=fault) for fault in faults}
    Path(out).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
