"""A package that looks like liger-kernel to whoever asks what it can do; it computes nothing."""

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest

KNOWN = """
def swiglu(rope=True, rms_norm=True, swiglu=True, model=None): pass
def geglu(rope=True, rms_norm=True, geglu=True, model=None): pass
MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": swiglu, "qwen2": swiglu, "gemma2": geglu, "mixtral": swiglu}
"""


def install_liger(folder: Path, monkeypatch: pytest.MonkeyPatch, known: str = KNOWN) -> None:
    """Put it into a folder, and that in front of the others."""
    package = folder / "liger_kernel"
    (package / "transformers").mkdir(parents=True)
    for place in (package, package / "transformers"):
        (place / "__init__.py").touch()
    (package / "transformers" / "monkey_patch.py").write_text(known)
    (package / "backends.py").write_text("chosen = []\nset_impl = chosen.append\n")
    forget_liger(monkeypatch)
    monkeypatch.syspath_prepend(folder)


def hide_liger(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it were not installed."""
    stock = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> Any:
        return None if name == "liger_kernel" else stock(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


def forget_liger(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nobody had imported it; afterwards as it was."""
    for name in ("", ".transformers", ".transformers.monkey_patch", ".backends"):
        monkeypatch.setitem(sys.modules, f"liger_kernel{name}", types.ModuleType(name))  # so that it is put back
        monkeypatch.delitem(sys.modules, f"liger_kernel{name}")
