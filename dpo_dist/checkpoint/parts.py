"""What a rank contributes to a checkpoint: files that are written at once, or by a thread from copies in host memory.

Whoever writes (`shards`, `weights`) returns parts. A part that is written later holds its own copies: training goes on
and changes weights and optimizer meanwhile.
"""

import copy
import threading
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from dpo_dist.checkpoint.manifest import hash_file
from dpo_dist.checkpoint.pickles import require_harmless
from dpo_dist.durable import sync
from dpo_dist.phases import inject


@dataclass(frozen=True)
class Part:
    """A file, or a folder with its files."""

    path: Path
    write: Callable[[], object] | None = None
    """None: it is written already."""


@dataclass
class Writing:
    """The parts of one rank on their way to the disk."""

    staging: Path
    parts: list[Part]
    records: dict[str, dict[str, Any]] = field(default_factory=dict)  # size and hash of each file, by relative path
    error: Exception | None = None
    _thread: threading.Thread | None = None

    def begin(self) -> None:
        """Write in a thread, while this process goes on. It ends with the process: the files are then left behind."""
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to wait for."""
        return self._thread is not None and not self._thread.is_alive()

    def finish(self) -> dict[str, dict[str, Any]]:
        """Write what is not yet written; the records.

        Raises:
            Exception: what a write raised.
        """
        if self._thread is None:
            self._run()
        else:
            self._thread.join()
        if self.error is not None:
            raise self.error
        return self.records

    def _run(self) -> None:
        try:
            for part in self.parts:
                if part.write is not None:
                    part.write()
            inject("save.written")
            files = [path for part in self.parts for path in _files(part.path)]
            self.records = settled(self.staging, (path.relative_to(self.staging).as_posix() for path in files))
        except Exception as error:  # raised by `finish`, on the thread that waits for it
            self.error = error


def settled(staging: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Sync and hash files, and make sure that they can be loaded again."""
    records = {}
    for name in names:
        sync(staging / name)
        if name.endswith(".pt"):
            require_harmless(staging / name, name)
        records[name] = asdict(hash_file(staging / name))
    return records


def on_host(value: Any, copies: dict[tuple[Any, ...], Tensor] | None = None) -> Any:
    """A copy that nothing changes any more: tensors in host memory, equal ones that share memory once."""
    copies = {} if copies is None else copies
    if isinstance(value, Tensor):
        key = (value.data_ptr(), value.shape, value.stride(), value.dtype, value.device)
        if key not in copies or not value.numel():
            copies[key] = value.detach().to("cpu", copy=True)
        return copies[key]
    if isinstance(value, dict):
        return type(value)((key, on_host(item, copies)) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value)(on_host(item, copies) for item in value)
    return copy.deepcopy(value)


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(found for found in path.rglob("*") if found.is_file())
    return [path] if path.exists() else []
