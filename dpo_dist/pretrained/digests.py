"""Hashes that tell models apart: what they compute, not what they are called.

Every byte of every tensor, read once and remembered by the file's size and time; and what is made of the tensors: the
settings of config.json (another rope_theta is another model), and code that the model brings with it.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import Any

import xxhash
from filelock import FileLock

from dpo_dist.errors import ModelError
from dpo_dist.pretrained.folder import ADAPTER_SETTINGS, first_line, read_header

# A file that was written just now may be written again within the same tick of the clock, with the same size.
_SETTLED_NS = 2 * 10**9


# Of config.json, what says nothing of the numbers that the model computes; a run has a dtype of its own.
_NAMES = (
    *("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "initializer_range"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)


def identity(folder: Path, memory: Path) -> str:
    """A hash of all tensors of a folder (names, dtypes, shapes and values), its settings, and its code.

    A file is read once, at the pace of the disk; from then on its size and time of change stand for it. Of several
    processes on a machine one reads, the others wait for what it found.

    Args:
        folder: with `*.safetensors`.
        memory: a folder of ours, where hashes are kept.
    Raises:
        ModelError: a file is damaged or cannot be read.
    """
    files = sorted(folder.glob("*.safetensors"))
    known = memory / f"{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]}.json"
    try:
        memory.mkdir(parents=True, exist_ok=True)
        with FileLock(known.with_suffix(".lock")):
            digests = _remembered(known, files, _digest_of)
    except OSError:  # a cache that cannot be written
        digests = [_digest_of(path) for path in files]
    return hashlib.sha256("".join([*digests, *_settings_of(folder)]).encode()).hexdigest()[:32]


def _settings_of(folder: Path) -> list[str]:
    """What is made of the tensors; nothing of an adapter's folder, which has settings of another name."""
    found = [f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in sorted(folder.glob("*.py"))]
    with suppress(FileNotFoundError):
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kept = {name: value for name, value in settings.items() if name not in _NAMES}
        found.append(json.dumps(kept, sort_keys=True))
    return found


def adapter_identity(folder: Path, memory: Path) -> str:
    """The same of an adapter: its tensors, and what its configuration makes of them."""
    settings = json.loads((folder / ADAPTER_SETTINGS).read_text(encoding="utf-8"))
    for name in ("base_model_name_or_path", "revision", "inference_mode", "peft_version"):
        settings.pop(name, None)
    text = identity(folder, memory) + json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _remembered(known: Path, files: list[Path], digest_of: Callable[[Path], str]) -> list[str]:
    entries = _entries(known)
    found = {}
    for path in files:
        stamp, entry = _stamp(path), entries.get(path.name, [None, ""])
        found[path.name] = entry if entry[0] == stamp else [stamp, digest_of(path)]
    settled = {name: entry for name, entry in found.items() if time.time_ns() - entry[0][1] > _SETTLED_NS}
    if settled != entries:
        partial = known.with_name(f".{known.name}.{os.getpid()}")
        partial.write_text(json.dumps({"files": settled, "seal": _seal(settled)}), encoding="utf-8")
        partial.replace(known)
    return [found[path.name][1] for path in files]


def _entries(known: Path) -> dict[str, Any]:
    """What was remembered, by file: its stamp and its hash. Nothing if it is not as it was written."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        stored = json.loads(known.read_text(encoding="utf-8"))
        if stored["seal"] == _seal(stored["files"]):
            return stored["files"]
    return {}


def _seal(entries: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(entries, sort_keys=True).encode())


def _stamp(path: Path) -> list[int]:
    # Of what a link leads to: the hub's cache holds links to files that are named by their content.
    status = path.stat()
    return [status.st_size, max(status.st_mtime_ns, status.st_ctime_ns), status.st_ino]


def _digest_of(path: Path) -> str:
    digest = xxhash.xxh3_128()
    try:
        with path.open("rb") as file:
            _digest_tensors(file, digest)
    except (OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise ModelError(f"{path} is damaged or no safetensors file ({first_line(error)}); copy it again") from None
    return digest.hexdigest()


def _digest_tensors(file: BufferedReader, digest: Any) -> None:
    header, header_size = read_header(file)
    end = 8 + header_size + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    missing = end - file.seek(0, os.SEEK_END)
    if missing > 0:
        raise ValueError(f"its last {missing} bytes are missing")
    for name, entry in sorted(header.items()):
        digest.update(f"{name} {entry['dtype']} {entry['shape']} {entry['data_offsets']}".encode())
    file.seek(8 + header_size)
    hashlib.file_digest(file, lambda: digest)  # of what follows
