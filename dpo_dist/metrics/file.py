"""Where numbers are written: a file, and trackers that get the same."""

import json
import logging
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from dpo_dist.phases import inject

LINES_FILE = "metrics.crc32"  # in a checkpoint: of every line until then, for a number with a flipped bit is a number

_LOGGER = logging.getLogger(__name__)


@runtime_checkable
class Tracker(Protocol):
    """Where the lines of `metrics.jsonl` are sent as well."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record the numbers of one line."""
        ...

    def close(self) -> None:
        """Flush."""
        ...


class MetricsFile:
    """`metrics.jsonl`: every line once, also after a resume. Owned by the first rank."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._trackers: dict[str, Tracker] = {}
        self._waiting: list[bytes] = []
        self._checksums: list[str] = []  # of every line that was written or kept

    def add_tracker(self, name: str, tracker: Tracker) -> None:
        """Send every further line to a tracker as well."""
        self._trackers[name] = tracker

    def write_checksums(self, checkpoint: Path) -> None:
        """Let a checkpoint know the lines that were written until then."""
        (checkpoint / LINES_FILE).write_text("".join(f"{one}\n" for one in self._checksums), encoding="ascii")

    def keep_until(self, step: int, checkpoint: Path | None = None, evaluated: bool = True) -> None:
        """Drop the lines of steps that a resumed run will compute again, and those that are not as they were written.

        A last line cut short by a kill is nothing to speak of; any other damage is.

        Args:
            step: the last one whose lines are kept.
            checkpoint: knows what was written (`write_checksums`), unless an earlier version made it.
            evaluated: the evaluation after `step` was before the checkpoint, if there was one; else its lines may have
                been written since.
        """
        self._checksums = []
        if not self._path.exists():
            return
        known = _known(checkpoint)
        kept: list[bytes] = []
        raw = self._path.read_bytes().split(b"\n")
        for number, line in enumerate(raw, start=1):
            values = _parsed(line)
            if values is not None and values["step"] <= step:
                later = not evaluated and values["step"] == step and values.get("split") == "evaluation"
                if known is None or later or _checksum(line) in known:
                    kept.append(line + b"\n")
                    self._checksums.append(_checksum(line))
                else:
                    said = "%s:%d: a line is not as it was when %s was saved, and is left out"
                    _LOGGER.warning(said, self._path, number, checkpoint)
            elif values is None and line.strip() and number < len(raw):
                _LOGGER.warning("%s:%d: a damaged line is left out", self._path, number)
        temporary = self._path.with_suffix(".tmp")
        # Made anew: a link of that name is not followed.
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:
            file.write(b"".join(kept))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)

    def _append(self) -> None:
        """Write the lines that wait: all of them, or none."""
        with self._path.open("ab", buffering=0) as file:
            end = file.tell()
            rest = memoryview(b"".join(self._waiting))
            try:
                inject("metrics")
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:
                file.truncate(end)
                raise
        self._waiting.clear()

    def sync(self) -> None:
        """Bring every line to the disk."""
        if self._waiting:
            self._append()
        if self._path.exists():
            with self._path.open("rb") as file:
                os.fsync(file.fileno())

    def evaluations(self, step: int) -> dict[str, dict[str, float]]:
        """The numbers of the held-out sets that were evaluated after update `step`, by name."""
        if not self._path.exists():
            return {}
        lines = filter(None, map(_parsed, self._path.read_bytes().split(b"\n")))
        of_sets = [line for line in lines if line["step"] == step and line.get("split") == "evaluation"]
        return {str(line.get("dataset")): _numbers(line) for line in of_sets}

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line and send its numbers to the trackers; evaluation keys get the prefix `eval_` there."""
        text = json.dumps(line, allow_nan=False).encode()
        self._checksums.append(_checksum(text))
        self._waiting.append(text + b"\n")
        try:
            self._append()
        except OSError as error:  # a full disk: the line waits, at the latest for the next checkpoint
            _LOGGER.warning("%s cannot be written (%s); its lines are kept and written later", self._path, error)
        numbers = _numbers(line)
        if line.get("split") == "evaluation":
            numbers = {f"eval_{line['dataset']}_{key}": value for key, value in numbers.items()}
        self._of_each(lambda tracker: tracker.log(numbers, int(line["step"])))

    def close(self) -> None:
        """Flush the trackers."""
        self._of_each(lambda tracker: tracker.close())

    def _of_each(self, call: Callable[[Tracker], None]) -> None:
        """A tracker that fails is left out from then on: the numbers are in the file, and the run goes on."""
        for name, tracker in list(self._trackers.items()):
            try:
                inject("tracker")
                call(tracker)
            except Exception as error:
                _LOGGER.warning("log.report_to=%s failed and gets no more lines (%r)", name, error)
                del self._trackers[name]


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A line of the file; None if it is damaged."""
    try:
        values = json.loads(line)
    except ValueError:
        return None
    return values if isinstance(values, dict) and isinstance(values.get("step"), int) else None


def _checksum(line: bytes) -> str:
    return f"{zlib.crc32(line):08x}"


def _known(checkpoint: Path | None) -> set[str] | None:
    """Checksums of the lines that were written until a checkpoint; None if it does not tell."""
    if checkpoint is None or not (checkpoint / LINES_FILE).is_file():
        return None
    return set((checkpoint / LINES_FILE).read_text(encoding="ascii").split())


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in line.items() if isinstance(value, int | float) and key != "step"}
