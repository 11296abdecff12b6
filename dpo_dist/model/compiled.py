"""Decoder layers by torch.compile, and a count of what it compiled.

A layer is compiled, not the model: all layers share what is compiled for the first one, and the number of packed tokens
is a symbol in it, so that micro-batches of other lengths need nothing new. Attention stays outside
(`attention/interface.py`): its kernels want lengths as numbers. In a layer that recomputes, it is the layer's own
forward that is compiled, so that it is so in backward as well.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._dynamo import config as dynamo_config
from torch._dynamo.backends.registry import lookup_backend
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo_dist.errors import ModelError

# For one function dynamo gives up, and computes it as written, after so many variants; its default is 8. Policy and
# reference, with and without gradient, layers with a window and without one are variants of one function here.
_VARIANTS = 64


@dataclass
class Compilations:
    """How much has been compiled in this process, for policy and reference together."""

    graphs: int = 0
    seconds: float = 0.0
    told: int = 0  # graphs that `news` has told of

    def news(self, step: int) -> str:
        """What was compiled since this was asked last; empty where nothing was.

        Args:
            step: updates made.
        """
        new, self.told = self.graphs - self.told, self.graphs
        if not new:
            return ""
        if new == self.graphs:
            return f"model.torch_compile: {new} graphs compiled until the end of step {step}, in {self.seconds:.0f} s"
        return f"model.torch_compile: {new} more graphs were compiled in step {step}, which was slower for it"


class _Compiled:
    """A mark."""


def compile_layers(model: PreTrainedModel, counted: Compilations) -> None:
    """Let every decoder layer be compiled when it is first run; in place.

    Args:
        model: whose attention was registered as `compiled`.
        counted: adds up what is compiled.

    Raises:
        ModelError: transformers cannot tell the layers of this class apart.
    """
    dynamo_config.recompile_limit = max(_VARIANTS, dynamo_config.recompile_limit)
    backend = _counting(counted)
    decoder: Any = model.get_decoder()
    layers = [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(
            f"model.torch_compile=true: the layers of architecture {model.config.model_type} cannot be compiled one by "
            "one: transformers does not know them as such; leave it out"
        )
    classes = {kind: _compiled_class(kind, backend) for kind in {type(layer) for layer in layers}}
    for layer in layers:
        layer.__class__ = classes[type(layer)]


def compiled_classes(model: nn.Module) -> set[type]:
    """The classes of layers that `compile_layers` has seen to."""
    return {type(module) for module in model.modules() if isinstance(module, _Compiled)}


def _compiled_class(kind: type[GradientCheckpointingLayer], backend: Callable[..., Any]) -> type:
    """The same class with its forward compiled; making it wraps that forward in transformers' recomputation again."""
    forward = vars(kind)["forward"].__wrapped__
    own = {"forward": torch.compile(forward, backend=backend, dynamic=True)}
    # DeepSpeed and transformers look layers up by these names.
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (_Compiled, kind), {**own, **names})


def _counting(counted: Compilations) -> Callable[..., Any]:
    inductor = lookup_backend("inductor")

    def compile_graph(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        started = time.perf_counter()
        try:
            return inductor(graph, inputs)
        finally:
            counted.graphs += 1
            counted.seconds += time.perf_counter() - started

    return compile_graph
