"""Which decoder layers compute their activations again in backward instead of keeping them.

The first ones: in backward their turn comes last, when everything after them has been let go, so that what one of them
computes again stands beside as little as possible. The values are the same bits either way.
"""

from typing import Any, Literal

from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

Recomputation = bool | Literal["auto"]  # model.gradient_checkpointing


def enable(model: PreTrainedModel, wanted: Recomputation) -> None:
    """Let all layers recompute; with `auto` only where the class can."""
    if wanted is True or (wanted == "auto" and model.supports_gradient_checkpointing):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})


def switchable(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """The layers that recompute or keep what they computed each for itself, in the order of the forward pass.

    None where the class cannot recompute: its layers would lack what does it.
    """
    if not model.supports_gradient_checkpointing:
        return []
    decoder: Any = model.get_decoder()
    return [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]


def recompute_first(model: PreTrainedModel, count: int) -> None:
    """The first `count` layers recompute, the others keep."""
    for index, layer in enumerate(switchable(model)):
        layer.gradient_checkpointing = index < count
