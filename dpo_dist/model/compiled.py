"""Decoder layers by torch.compile, and a count of what it compiled.

A layer is compiled, not the model: all layers share what is compiled for the first one, and the number of packed tokens
is a symbol in it, so that micro-batches of other lengths need nothing new. Attention stays outside
(`attention/interface.py`): its kernels want lengths as numbers. In a layer that recomputes, it is the layer's own
forward that is compiled, so that it is so in backward as well.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._dynamo import config as dynamo_config
from torch._dynamo.backends.registry import lookup_backend
from torch._inductor.cpu_vec_isa import pick_vec_isa
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo_dist.errors import ModelError

# For one function dynamo gives up, and computes it as written, after so many variants; its default is 8. Policy and
# reference, with and without gradient, layers with a window and without one are variants of one function here.
_VARIANTS = 64


class Compilations:
    """Compiles, and counts what it has compiled in this process: of policy and reference together.

    Attributes:
        graphs: how many.
        seconds: that it took.
    """

    def __init__(self) -> None:
        self.graphs, self.seconds, self._told = 0, 0.0, 0
        self._inductor: Any = lookup_backend("inductor")
        self._settings: dict[str, Any] = {}
        if not torch.cuda.is_available():
            # torch 2.13 keeps C++ for one width of vectors and compiles it for another, where ATEN_CPU_CAPABILITY or
            # the machine changes and its cache stays: wrong numbers, and memory overwritten. Written out, the width is
            # part of the cache's key.
            self._settings["cpp.simdlen"] = pick_vec_isa().bit_width()
        self._backend = self._compile_graph  # always the same object: torch keeps what it compiled by it

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function compiled, when it is first called, for all lengths."""
        dynamo_config.recompile_limit = max(_VARIANTS, dynamo_config.recompile_limit)
        return torch.compile(function, backend=self._backend, dynamic=True)

    def _compile_graph(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        started = time.perf_counter()
        try:
            return self._inductor(graph, inputs, config_patches=self._settings)
        finally:
            self.graphs += 1
            self.seconds += time.perf_counter() - started

    def news(self, step: int) -> str:
        """What was compiled since this was asked last; empty where nothing was.

        Args:
            step: updates made.
        """
        new, self._told = self.graphs - self._told, self.graphs
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
    decoder: Any = model.get_decoder()
    layers = [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(
            f"model.torch_compile=true: the layers of architecture {model.config.model_type} cannot be compiled one by "
            "one: transformers does not know them as such; leave it out"
        )
    classes = {kind: _compiled_class(kind, counted) for kind in {type(layer) for layer in layers}}
    for layer in layers:
        layer.__class__ = classes[type(layer)]


def compiled_classes(model: nn.Module) -> set[type]:
    """The classes of layers that `compile_layers` has seen to."""
    return {type(module) for module in model.modules() if isinstance(module, _Compiled)}


def _compiled_class(kind: type[GradientCheckpointingLayer], counted: Compilations) -> type:
    """The same class with its forward compiled; making it wraps that forward in transformers' recomputation again."""
    own = {"forward": counted.compile(vars(kind)["forward"].__wrapped__)}
    # DeepSpeed and transformers look layers up by these names.
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (_Compiled, kind), {**own, **names})
