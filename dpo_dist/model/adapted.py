"""An adapter that PEFT has put into a model: what the policy adds, and how the model answers without it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dpo_dist.batch import MicroBatch
from dpo_dist.model.packed import Packed, as_packed, with_virtual_embeddings, with_virtual_keys

if TYPE_CHECKING:
    from peft import PeftModel
else:
    PeftModel = Any  # a run without an adapter does not import PEFT

POLICY, REFERENCE = "default", "reference"  # PEFT's names of the adapter that is trained, and of its frozen copy


@dataclass
class Adapter:
    """PEFT's model around the language model, which keeps its place: PEFT replaces layers inside of it."""

    peft: PeftModel
    kind: str  # as `adapter.peft_type`
    base_model: str  # what the user wrote
    has_copy: bool  # the reference is a frozen copy of the adapter, not the bare model
    layers: list[Any]  # those that PEFT can switch off
    allocator: Callable[..., Any] | None = None  # PEFT's, which takes ranks away; of AdaLoRA
    answers: str | None = POLICY  # which adapter acts; None: none

    @property
    def is_prompt_learning(self) -> bool:
        """Whether it adds virtual tokens, and leaves layers alone."""
        return bool(self.config.is_prompt_learning)

    @property
    def config(self) -> Any:
        """PEFT's configuration of the trained adapter."""
        return self.peft.peft_config[POLICY]

    def pack(self, batch: MicroBatch) -> Packed:
        """What the decoder is handed."""
        if not self.is_prompt_learning or self.answers is None:
            return as_packed(batch)
        if self.kind == "prefix_tuning":
            return with_virtual_keys(batch, self.config.num_virtual_tokens, self.peft.get_prompt(batch_size=1))
        base: Any = self.peft.get_base_model()
        embed = base.get_input_embeddings()
        return with_virtual_embeddings(batch, embed(batch.input_ids_T), self.peft.get_prompt(batch_size=1)[0])

    def asked(self, model: Any) -> Any:
        """Whose own forward answers: PEFT's where virtual tokens act, else the model's, whose layers PEFT replaced."""
        return self.peft if self.is_prompt_learning and self.answers is not None else model

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Inside, no adapter acts, or the frozen copy does.

        PEFT's own switches also set `requires_grad` of what they switch, which a running engine relies on. So its flags
        are set here, and it is asked whether it has understood.
        """
        before = [(layer._disable_adapters, layer._active_adapter) for layer in self.layers]
        answers, active = self.answers, self.peft.active_adapter
        try:
            self.answers = REFERENCE if self.has_copy else None
            if self.has_copy:
                self.peft.active_adapter = REFERENCE
            for layer in self.layers:
                _switch(layer, self.has_copy)
            yield
        finally:
            self.answers, self.peft.active_adapter = answers, active
            for layer, (disabled, name) in zip(self.layers, before, strict=True):
                layer._disable_adapters, layer._active_adapter = disabled, name


def _switch(layer: Any, to_copy: bool) -> None:
    if to_copy:
        layer._active_adapter = [REFERENCE]
        assert layer.active_adapters == [REFERENCE] and not layer.disable_adapters, type(layer)
    else:
        layer._disable_adapters = True
        assert layer.disable_adapters, type(layer)


def base_name(name: str) -> str | None:
    """The name that a parameter of an adapted model has in the bare model; None if it belongs to the adapter."""
    parts = name.split(".")
    if "modules_to_save" in parts or "prompt_encoder" in parts or any(part.startswith("lora_") for part in parts):
        return None
    if "ranknum" in parts:
        return None
    return ".".join(part for part in parts if part not in ("base_layer", "original_module"))
