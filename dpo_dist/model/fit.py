"""Whether a folder's files fit the architecture of its configuration: names and shapes, known without loading."""

import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from dpo_dist.errors import ModelError
from dpo_dist.pretrained.folder import first_line, raise_if_own_code, weight_files

Shape = tuple[int, ...]
_PLAIN = frozenset({"F64", "F32", "BF16", "F16"})


@dataclass(frozen=True)
class Fit:
    """What files and architecture do not have in common."""

    missing: tuple[str, ...]  # weights of the architecture that no file holds under this name
    misshapen: tuple[tuple[str, Shape, Shape], ...]  # name, shape in the file, shape in the architecture
    unused: tuple[str, ...]  # what the files hold besides
    foreign: tuple[tuple[str, str], ...]  # name and type of weights that are not plain numbers, such as F8_E4M3
    untied: str  # a weight that is there beside the one that it is tied to, with other values; "" if there is none
    has_tied_twice: bool  # a weight that the configuration ties to another is there as well
    is_converted: bool  # transformers makes other tensors of those in the files

    @property
    def is_exact(self) -> bool:
        """Every tensor of the model stands in the files under its own name, as it is computed with."""
        return not (self.missing or self.misshapen or self.has_tied_twice or self.is_converted)

    def require(self, key: str, folder: Path) -> None:
        """Refuse what cannot load. Names that differ are left to transformers, which knows former names.

        Args:
            key: the dotted path the folder was written under.
            folder: for messages.
        Raises:
            ModelError: naming a tensor.
        """
        if self.foreign:
            name, kind = self.foreign[0]
            raise ModelError(
                f"{key}={folder}: {name} is stored as {kind}, and only float32, bfloat16 and float16 can be trained; "
                "give a folder whose weights are not quantised"
            )
        if self.untied:
            raise ModelError(
                f"{key}={folder}: its config.json ties {self.untied} to the embeddings, and its files hold other "
                "values for it; set tie_word_embeddings to false in config.json, or copy the model again"
            )
        if self.is_converted:
            return
        if self.misshapen:
            name, found, expected = self.misshapen[0]
            raise ModelError(
                f"{key}={folder}: {len(self.misshapen)} weights have other shapes than its config.json says, such "
                f"as {name}: {found}, expected {expected}; weights and config.json must be of one model"
            )
        if self.missing and not self.unused:
            raise ModelError(
                f"{key}={folder} lacks {len(self.missing)} weights of its architecture, such as {self.missing[0]}; "
                "they would be random numbers. Give a complete model"
            )

    def remark(self, key: str, folder: Path) -> str | None:
        """What is left out of a model that loads."""
        if self.is_converted or self.missing or not self.unused:
            return None
        return (
            f"{key}={folder}: {len(self.unused)} tensors of its files are in no part of the model that its config.json "
            f"describes, and are left out, such as {self.unused[0]}"
        )


def find_fit(folder: Path, config: PretrainedConfig, trust_remote_code: bool) -> Fit:
    """Compare what the files' headers say with the architecture, which is built without memory.

    Args:
        folder: what `resolve_folder` gave.
        config: what `load_config` gave.
        trust_remote_code: run code that lies in the folder.
    Raises:
        ModelError: a file is damaged.
    """
    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(deepcopy(config), trust_remote_code=trust_remote_code)
    except Exception as error:  # each class refuses in its own way
        raise_if_own_code(error, str(folder), "model.trust_remote_code=true")
        detail = f"{type(error).__name__}: {first_line(error)}"
        raise ModelError(
            f"{folder}: no model can be built from its config.json ({detail}); copy the folder again"
        ) from error
    tied = getattr(model, "all_tied_weights_keys", {})
    stored: dict[str, Shape] = {}
    kinds: dict[str, str] = {}
    places: dict[str, Path] = {}
    for path in weight_files(folder):
        found = _shapes(path)
        stored |= {name: shape for name, (shape, _) in found.items()}
        kinds |= {name: kind for name, (_, kind) in found.items()}
        places |= dict.fromkeys(found, path)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    ignored = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), r"rotary_emb\.inv_freq"]
    return Fit(
        missing=tuple(sorted(expected.keys() - stored.keys())),
        misshapen=tuple(
            (name, stored[name], shape) for name, shape in expected.items() if name in stored and stored[name] != shape
        ),
        unused=tuple(
            name
            for name in sorted(stored.keys() - expected.keys() - tied.keys())
            if not any(re.search(pattern, name) for pattern in ignored)
        ),
        foreign=tuple((name, kind) for name, kind in sorted(kinds.items()) if kind not in _PLAIN and name in expected),
        untied=_untied(tied, places),
        has_tied_twice=bool(stored.keys() & tied.keys()),
        is_converted=any(isinstance(entry, WeightConverter) for entry in get_model_conversion_mapping(model)),
    )


def _untied(tied: Mapping[str, str], places: Mapping[str, Path]) -> str:
    """The first weight that differs from the one it is tied to, where the files hold both."""
    for name, primary in tied.items():
        if name in places and primary in places:
            tensors = []
            for one in (name, primary):
                with safe_open(places[one], framework="pt") as file:
                    tensors.append(file.get_tensor(one))
            if not torch.equal(*tensors):
                return name
    return ""


def _shapes(path: Path) -> dict[str, tuple[Shape, str]]:
    """Shape and type of every tensor."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (tuple(one.get_shape()), one.get_dtype()) for name, one in slices.items()}
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} is damaged or no safetensors file ({first_line(error)}); copy it again") from None
