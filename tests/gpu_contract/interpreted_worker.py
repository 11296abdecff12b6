"""A packed Llama on flash-attn's interpreted kernels against the stock forward, honestly and with planted faults.

    python -m tests.gpu_contract.interpreted_worker OUT.json

OUT gets the largest distances of log-probabilities and gradients. The package's Triton backend ignores windows and
softcap: those are held by tests/unit/test_attention.py, against loops that take flash-attn's arguments.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.gpu_contract.interpreted import activate

activate()

import torch  # noqa: E402
from transformers import LlamaConfig  # noqa: E402

from dpo_dist.attention import packages  # noqa: E402
from tests.parity.oracle import gradients, naive_logps, objective, our_logps, random_example, stock_and_ours  # noqa: E402

# One-token completions have no query of their own; in the second example no segment of theirs is left.
EXAMPLES = [random_example(1, 19, [9, 7]), random_example(2, 1, [1, 6]), random_example(3, 9, [5, 1, 8])]

Arguments = dict[str, Any]
FAULTS: dict[str, Callable[[Arguments], Arguments]] = {
    "not causal": lambda a: a | {"causal": False},
    "another scale": lambda a: a | {"softmax_scale": a["softmax_scale"] * 1.1},
    "keys of another segment": lambda a: a | {"cu_seqlens_k": a["cu_seqlens_k"].clamp(max=a["cu_seqlens_k"][-1] - 1)},
    "as many keys as queries": lambda a: a | {"cu_seqlens_k": a["cu_seqlens_q"], "max_seqlen_k": a["max_seqlen_q"]},
    "values of the keys": lambda a: a | {"v": a["k"]},
    "an empty segment": lambda a: a | {key: _with_empty_segment(a[key]) for key in ("cu_seqlens_q", "cu_seqlens_k")},
    "half a gradient": lambda a: a | {"v": (a["v"] + a["v"].detach()) / 2},
}
WITH_GRADIENTS = (None, "half a gradient")


def _with_empty_segment(ends: Any) -> Any:
    """The first segment's start a second time."""
    return torch.cat([ends[:1], ends])


@contextmanager
def planted(fault: str | None) -> Iterator[list[Arguments]]:
    """Note every call of the package's function, after a fault is planted in its arguments."""
    stock, calls = packages.FlashPackage.function, []

    def function(self: packages.FlashPackage) -> Callable[..., torch.Tensor]:
        real = stock(self)

        def call(**arguments: Any) -> torch.Tensor:
            calls.append(FAULTS[fault](arguments) if fault else arguments)
            return real(**calls[-1])

        return call

    packages.FlashPackage.function = function
    try:
        yield calls
    finally:
        packages.FlashPackage.function = stock


def compare(fault: str | None, share: bool) -> dict[str, Any]:
    """Distances of a model from its stock forward, sequence by sequence."""
    config = LlamaConfig(
        vocab_size=67, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.25,
    )  # fmt: skip
    stock, ours = stock_and_ours(config, torch.float32, backend="flash_attn")
    expected = naive_logps(stock, EXAMPLES)
    expected_gradients = gradients(stock, objective(expected))
    with planted(fault) as calls:
        actual = our_logps(ours, EXAMPLES, share)
        actual_gradients = gradients(ours, objective(actual)) if fault in WITH_GRADIENTS else {}
    relative = [
        ((actual_gradients[key] - value).norm() / value.norm()).item()
        for key, value in expected_gradients.items()
        if key in actual_gradients
    ]
    return {
        "logps": (actual - expected).abs().max().item(),
        "gradients": max(relative, default=None),
        "num_gradients": [len(relative), len(expected_gradients)],
        "calls": len(calls),
        "segments": [call["cu_seqlens_q"].diff().tolist() for call in calls],
    }


def main() -> None:
    """Honestly, with shared prompts and without; and with each fault."""
    results = {"shared": compare(None, share=True), "unshared": compare(None, share=False)}
    results |= {fault: compare(fault, share=True) for fault in FAULTS}
    Path(sys.argv[1]).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
