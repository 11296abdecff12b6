"""The kind of an adapter, also of one on disk: read from its JSON, without PEFT."""

import json
from pathlib import Path
from typing import Any

from dpo_dist.config import AdapterConfig
from dpo_dist.errors import ModelError
from dpo_dist.pretrained.folder import ADAPTER_SETTINGS, first_line

SETTINGS_FILE, WEIGHTS_FILE = ADAPTER_SETTINGS, "adapter_model.safetensors"
KEY = "adapter.adapter_name_or_path"
KINDS = {
    "LORA": "lora",
    "ADALORA": "adalora",
    "PREFIX_TUNING": "prefix_tuning",
    "PROMPT_TUNING": "prompt_tuning",
    "P_TUNING": "p_tuning",
}
PROMPT_LEARNING = frozenset({"prefix_tuning", "prompt_tuning", "p_tuning"})


def adapter_kind(config: AdapterConfig) -> str | None:
    """The kind of the adapter as `adapter.peft_type` says it, also of one on disk; None without an adapter.

    Raises:
        ModelError: the folder holds no adapter that can be trained here.
    """
    if config.adapter_name_or_path is not None:
        return require_adapter_folder(config.adapter_name_or_path)[1]
    return config.peft_type


def is_prompt_learning(config: AdapterConfig) -> bool:
    """Whether the adapter is virtual tokens before every prompt, and cannot be merged into weights."""
    return adapter_kind(config) in PROMPT_LEARNING


def require_adapter_folder(name: str) -> tuple[Path, str]:
    """The folder of an adapter, and its kind as `adapter.peft_type` would say it. Reads no weights.

    Args:
        name: what the user wrote; a folder on disk.
    Raises:
        ModelError: it is no adapter, or none that can be trained here.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise ModelError(f"{KEY}={name} does not exist; give the folder that PEFT's save_pretrained wrote")
    for file in (SETTINGS_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            hint = "; pickled weights (adapter_model.bin) are not read" if file == WEIGHTS_FILE else ""
            raise ModelError(f"{KEY}={name} has no {file}; give the folder that PEFT's save_pretrained wrote{hint}")
    values = adapter_values(folder, name)
    kind = KINDS.get(str(values.get("peft_type")))
    if kind is None:
        raise ModelError(
            f"{KEY}={name}: an adapter of type {values.get('peft_type')} cannot be trained here; supported are "
            f"{', '.join(KINDS)}"
        )
    if values.get("task_type") != "CAUSAL_LM":
        raise ModelError(f"{KEY}={name}: its task_type is {values.get('task_type')}; only CAUSAL_LM can be trained")
    if kind == "p_tuning" or values.get("prefix_projection"):
        raise ModelError(
            f"{KEY}={name}: a saved {kind} adapter holds what its encoder gave, not the encoder; it cannot be "
            "trained any further. Start a new one by adapter.peft_type"
        )
    return folder, kind


def adapter_values(folder: Path, name: str) -> dict[str, Any]:
    """What an adapter's configuration says.

    Raises:
        ModelError: it cannot be read.
    """
    try:
        values = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{KEY}={name}: its {SETTINGS_FILE} is damaged ({first_line(error)}); copy it again") from None
    if not isinstance(values, dict):
        raise ModelError(f"{KEY}={name}: its {SETTINGS_FILE} holds no settings; give the folder PEFT wrote")
    return values
