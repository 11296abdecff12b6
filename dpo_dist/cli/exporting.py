"""`dpo-dist export`: what was trained, as others load it."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from dpo_dist.checkpoint import export_checkpoint, require_unused
from dpo_dist.errors import ConfigError
from dpo_dist.pretrained import KINDS, PROMPT_LEARNING, load_config, resolve_folder

_SETTINGS = "adapter_config.json"


def run_export(
    source: Path, out: Path, trust_remote_code: bool, merged: bool, base: str | None, cache_dir: Path
) -> Path:
    """Write a model or an adapter.

    Args:
        source: a checkpoint, or with `merged` an exported adapter.
        out: the folder to make.
        trust_remote_code: run code that belongs to the model.
        merged: write the whole model that an adapter makes of its base.
        base: that base, where the adapter does not name it, or names a place that is gone.
        cache_dir: where the demo model is.
    Raises:
        ConfigError, CheckpointError, ModelError: what cannot be done, and the way out.
    """
    assets = source / "model_assets"
    is_adapter = (assets / _SETTINGS).is_file() or (source / _SETTINGS).is_file()
    if not is_adapter and (merged or base is not None):
        option = "--merged" if merged else "--base"
        raise ConfigError(f"{option}: {source} holds no adapter ({_SETTINGS}); leave {option} out")
    if base is not None and not merged:
        raise ConfigError("--base has no effect without --merged; leave it out")
    if not is_adapter:
        return export_checkpoint(source, out, trust_remote_code=trust_remote_code)
    from dpo_dist.adapters import export_adapter_checkpoint

    if not merged:
        if (source / _SETTINGS).is_file():
            raise ConfigError(f"CHECKPOINT={source} is an exported adapter already; --merged adds it to its model")
        return export_adapter_checkpoint(source, out)
    require_unused(out, source)
    settings = source if (source / _SETTINGS).is_file() else assets
    kind = json.loads((settings / _SETTINGS).read_text(encoding="utf-8")).get("peft_type")
    if KINDS.get(kind) in PROMPT_LEARNING:
        raise ConfigError(
            f"--merged: the adapter of {source} is of type {kind}, virtual tokens that cannot be merged into weights; "
            "leave --merged out"
        )
    if (source / _SETTINGS).is_file():
        return _merge(source, source, out, trust_remote_code, base, cache_dir)
    with tempfile.TemporaryDirectory(dir=_existing(out)) as folder:
        adapter = export_adapter_checkpoint(source, Path(folder) / "adapter")
        return _merge(adapter, assets, out, trust_remote_code, base, cache_dir)


def _merge(adapter: Path, assets: Path, out: Path, trust_remote_code: bool, base: str | None, cache_dir: Path) -> Path:
    named = base or json.loads((adapter / _SETTINGS).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not named:
        raise ConfigError(f"{adapter} does not name its model; give it with --base")
    folder = resolve_folder(named, "--base", None, cache_dir)
    written = assets / "config.json"
    shown = ("CHECKPOINT", assets) if written.is_file() else ("--base", folder)
    config: Any = load_config(shown[1], trust_remote_code, shown[0], "--trust-remote-code")
    tokenizer = AutoTokenizer.from_pretrained(assets) if (assets / "tokenizer.json").is_file() else None
    from dpo_dist.adapters import export_merged

    return export_merged(
        folder, adapter, out, config.dtype or torch.float32, tokenizer, trust_remote_code=trust_remote_code
    )


def _existing(out: Path) -> Path:
    return next(path for path in out.absolute().parents if path.is_dir())
