"""torch's flight recorder: which collectives this process has begun. It is on unless TORCH_FR_BUFFER_SIZE=0.

Its functions are torch's own affair (2.13): where they are missing, nothing is known, and nobody stumbles. What NCCL's
recorder tells has not been seen on a GPU yet.
"""

import json
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch._C._distributed_c10d as _c10d

_SHOWN, _PATIENCE = 20, 5.0

T = TypeVar("T")


def last_collectives(on_gpu: bool) -> tuple[int, list[str]]:
    """How many collectives this process has begun, and a line for each of the last ones.

    Args:
        on_gpu: whether NCCL's are meant, else those of gloo.
    Returns:
        The number, 0 where it is not known; lines that end with a line break, the newest last.
    """
    dump = getattr(_c10d, "_dump_nccl_trace_json" if on_gpu else "_dump_fr_trace_json", None)
    try:
        recorded: dict[str, Any] = json.loads(dump()) if dump is not None else {}
        entries = recorded.get("entries", [])
        return max((entry["record_id"] + 1 for entry in entries), default=0), [_line(one) for one in entries[-_SHOWN:]]
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError):
        return 0, []


def without_waiting(call: Callable[[], T], otherwise: T) -> T:
    """What a call returns within a few seconds: where a device hangs, its recorder may as well."""
    found = [otherwise]

    def ask() -> None:
        found[0] = call()

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_PATIENCE)
    return found[0]


def write_trace(path: Path) -> None:
    """Write down what NCCL's recorder holds, for `torchfrtrace`."""
    dump = getattr(_c10d, "_dump_nccl_trace", None)
    with suppress(OSError, RuntimeError):
        if dump is not None:
            path.write_bytes(dump())


def _line(entry: dict[str, Any]) -> str:
    sizes = " ".join(map(str, entry.get("input_sizes", [])))
    return f"  {entry['record_id'] + 1}: {entry['profiling_name']} of {sizes or 'nothing'}, {entry.get('state', '')}\n"
