"""Packed models on Liger's interpreted kernels against the stock forward, honestly and with planted faults.

    python -m tests.gpu_contract.liger_worker OUT.json

OUT gets the largest distances of log-probabilities and gradients, how often each kernel ran, and what is left of Liger
in the process.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.gpu_contract.interpreted import activate_liger

activate_liger()

import torch  # noqa: E402
from liger_kernel.ops import rms_norm, rope, swiglu  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from transformers import PretrainedConfig  # noqa: E402
from transformers.models.llama import modeling_llama  # noqa: E402
from triton.runtime.interpreter import InterpretedFunction  # noqa: E402

from dpo_dist.logprobs import LogProbHead  # noqa: E402
from dpo_dist.model.liger import LIGER_CHECKED, use_liger, without_liger  # noqa: E402
from tests.parity.oracle import gradients, naive_logps, objective, our_logps, random_example, stock_and_ours  # noqa: E402
from tests.parity.test_architectures import CASES, build  # noqa: E402

# Positions start again at every completion of a shared prompt.
EXAMPLES = [random_example(1, 9, [5, 1, 7]), random_example(2, 1, [4, 6])]

Call = Callable[..., Any]
# By name: the module, the function that launches a kernel, and what is done to its arguments.
FAULTS: dict[str, tuple[Any, str, Callable[[Call], Call]]] = {
    "weights of the norm": (rms_norm, "rms_norm_forward", lambda f: lambda x, w, *a: f(x, w * 1.05, *a)),
    "epsilon of the norm": (rms_norm, "rms_norm_forward", lambda f: lambda x, w, eps, *a: f(x, w, 0.1, *a)),
    "positions of the neighbour": (
        rope,
        "rope_forward",
        lambda f: lambda q, k, cos, sin, *a: f(q, k, cos.roll(1, 1), sin.roll(1, 1), *a),
    ),
    "positions that go on": (rope, "rope_forward", lambda f: lambda q, k, *a: f(q, k, *_going_on(q.shape), *a[2:])),
    "gate and up exchanged": (swiglu, "swiglu_forward", lambda f: lambda a, b, *rest: f(b, a, *rest)),
    "gradient of the norm": (rms_norm, "rms_norm_backward", lambda f: lambda dy, *a, **k: f(dy * 1.05, *a, **k)),
    "rotated forward in backward": (
        rope,
        "rope_backward",
        lambda f: lambda dq, dk, cos, sin, **k: f(dq, dk, cos, -sin, **k),
    ),
    "gradient of the MLP": (swiglu, "swiglu_backward", lambda f: lambda a, b, dc, *rest: f(a, b, dc * 1.05, *rest)),
}


def _going_on(shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of positions that do not start again."""
    half = torch.arange(0, shape[-1], 2) / shape[-1]
    angles = torch.arange(shape[2])[:, None] / 10000.0**half
    return torch.cat([angles, angles], -1).cos()[None], torch.cat([angles, angles], -1).sin()[None]


@contextmanager
def planted(fault: str | None) -> Iterator[None]:
    """A fault around one of Liger's launches."""
    if fault is None:
        yield
        return
    module, name, around = FAULTS[fault]
    stock = getattr(module, name)
    setattr(module, name, around(stock))
    try:
        yield
    finally:
        setattr(module, name, stock)


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """How often each kernel is launched."""
    calls: Counter[str] = Counter()
    stock = InterpretedFunction.run

    def run(self: Any, *arguments: Any, **settings: Any) -> Any:
        calls[self.fn.__name__] += 1
        return stock(self, *arguments, **settings)

    InterpretedFunction.run = run
    try:
        yield calls
    finally:
        InterpretedFunction.run = stock


def compare(
    config: PretrainedConfig, share: bool = True, fault: str | None = None, used: bool = True
) -> dict[str, Any]:
    """Distances of a model from its stock forward, sequence by sequence."""
    without_liger()
    stock, ours = stock_and_ours(config, torch.float32)
    expected = naive_logps(stock, EXAMPLES)
    expected_gradients = gradients(stock, objective(expected))
    if used:
        use_liger(ours.model)
    with planted(fault), counted() as calls:
        logps = our_logps(ours, EXAMPLES, share)
        forward = dict(calls)
        actual = gradients(ours, objective(logps))
    # Some gradients are zero but for rounding: hold those to the largest.
    largest = max(value.abs().max() for value in expected_gradients.values())
    distances = [
        ((actual[name] - value).abs().max() / (value.abs().max() + 0.01 * largest)).item()
        for name, value in expected_gradients.items()
    ]
    return {
        "logps": (logps - expected).abs().max().item(),
        "gradients": max(distances),
        "same_names": actual.keys() == expected_gradients.keys(),
        "forward": forward,
        "backward": dict(calls - Counter(forward)),
        "head": type(ours.model.get_output_embeddings()) is LogProbHead,
        "whole_forward": "forward" not in vars(ours.model),
    }


def left_behind() -> dict[str, Any]:
    """What Liger has replaced in the process, with a model that it computes, and after it was given up."""
    without_liger()
    names = ("LlamaRMSNorm", "LlamaMLP", "LlamaForCausalLM", "apply_rotary_pos_emb")
    before = {name: getattr(modeling_llama, name) for name in names}
    forward, cross_entropy = modeling_llama.LlamaForCausalLM.forward, F.cross_entropy
    for name in ("llama", "granite", "llama"):
        use_liger(stock_and_ours(build(name, **CASES[name].shape), torch.float32)[1].model)
    replaced = [name for name in names if getattr(modeling_llama, name) is not before[name]]
    without_liger()
    return {
        "replaced": replaced,
        "given_back": [name for name in names if getattr(modeling_llama, name) is not before[name]],
        "forward": modeling_llama.LlamaForCausalLM.forward is forward,
        "cross_entropy": F.cross_entropy is cross_entropy,
    }


def main() -> None:
    """Every architecture with shared prompts; Llama unshared, with biases, without Liger, and with each fault."""
    llama = build("llama")
    biased = build("llama", mlp_bias=True)
    results: dict[str, Any] = {
        "architectures": {
            name: compare(build(name, **CASES[name].shape, **CASES[name].features)) for name in sorted(LIGER_CHECKED)
        },
        "unshared": compare(llama, share=False),
        "biased": [compare(biased) for _ in range(2)],  # as the policy, then as the reference
        "unused": compare(llama, used=False),
        "faults": {fault: compare(llama, fault=fault) for fault in FAULTS},
        "left": left_behind(),
    }
    Path(sys.argv[1]).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
