"""What has been sampled and scored so far: a file of lines that only grows, so that a kill loses one line at most."""

import errno
import fcntl
import json
import os
import threading
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from dpo_dist.errors import DataError, FolderInUseError
from dpo_dist.sampling.prompts import Settings


@dataclass(frozen=True)
class Completion:
    """What a model said."""

    text: str
    is_cut: bool
    """It had not come to its end when it reached the limit of tokens."""


@dataclass(frozen=True)
class Verdict:
    """What a judge said of two completions, in the order in which they were shown."""

    better: str
    """first, second or tie."""
    is_nonsense: bool = False
    """The judge said nothing that can be read, and it counts as a tie."""


class Journal:
    """The file `OUT.jsonl.partial`. Its first line holds the settings, each other one a completion, a verdict,
    or scores.

    Several threads may add to it; a second process is refused.

    Args:
        path: need not be there.
        settings: of the completions.
    Raises:
        DataError: it was begun with other settings, is damaged, or cannot be written.
        FolderInUseError: another process writes it.
    """

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path = path
        self.completions: dict[str, dict[int, Completion]] = defaultdict(dict)
        self._verdicts: dict[tuple[str, str], dict[tuple[int, int], Verdict]] = defaultdict(dict)
        self._scores: dict[tuple[str, str], list[float]] = {}
        self._lock = threading.Lock()
        try:
            self._file = path.open("a+b", buffering=0)  # what cannot be written must not wait in memory
        except OSError as error:
            raise _cannot_write(path, error) from error
        try:
            self._take(settings)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def num_completions(self) -> int:
        """How many it holds."""
        return sum(len(found) for found in self.completions.values())

    def add_completions(self, found: Sequence[tuple[str, int, Completion]]) -> None:
        """Keep completions: the prompt's key, the number, and what was said. Those that are there already stay."""
        with self._lock:
            new = [(key, k, one) for key, k, one in found if k not in self.completions[key]]
            self._write([{"key": key, "k": k, **asdict(one)} for key, k, one in new])
            for key, k, one in new:
                self.completions[key][k] = one

    def verdicts(self, key: str, judge: str) -> dict[tuple[int, int], Verdict]:
        """What this judge has said of the completions of a prompt, by their places in the order shown."""
        return self._verdicts[key, judge]

    def add_verdict(self, key: str, judge: str, shown: tuple[int, int], verdict: Verdict) -> None:
        """Keep one."""
        with self._lock:
            self._write([{"key": key, "judge": judge, "shown": shown, **asdict(verdict)}])
            self._verdicts[key, judge][shown] = verdict

    def scores(self, key: str, reward_model: str) -> list[float] | None:
        """What this reward model has given to the different completions of a prompt; None: nothing yet."""
        return self._scores.get((key, reward_model))

    def add_scores(self, reward_model: str, found: Sequence[tuple[str, list[float]]]) -> None:
        """Keep those of some prompts, by their keys."""
        with self._lock:
            self._write([{"key": key, "reward_model": reward_model, "scores": scores} for key, scores in found])
            self._scores.update({(key, reward_model): scores for key, scores in found})

    # ---- the file

    def _take(self, settings: Settings) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderInUseError(f"{self.path}: another process writes it; wait for its end") from None
        self._file.seek(0)
        whole, _, torn = self._file.read().rpartition(b"\n")
        if torn:
            self._file.truncate(len(whole) + bool(whole))  # the line that a kill has cut
        lines = whole.split(b"\n") if whole else []
        try:
            records = [json.loads(line) for line in lines]
            if not records:
                self._write([{"settings": asdict(settings)}])
                return
            self._require_same(records[0]["settings"], asdict(settings))
            for record in records[1:]:
                self._remember(record)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"{self.path} is damaged ({type(error).__name__}: {error}); remove it to begin anew"
            ) from error

    def _require_same(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        for name, value in now.items():
            if before[name] != value:
                raise DataError(
                    f"{self.path} was begun with {name}={before[name]}, and this is {name}={value}; give the settings "
                    "it was begun with to go on, give another --out, or remove it to begin anew"
                )

    def _remember(self, record: dict[str, Any]) -> None:
        if "judge" in record:
            shown = (int(record["shown"][0]), int(record["shown"][1]))
            verdict = Verdict(record["better"], record["is_nonsense"])
            self._verdicts[record["key"], record["judge"]][shown] = verdict
        elif "reward_model" in record:
            self._scores[record["key"], record["reward_model"]] = [float(score) for score in record["scores"]]
        else:
            self.completions[record["key"]][record["k"]] = Completion(record["text"], record["is_cut"])

    def _write(self, records: Sequence[dict[str, Any]]) -> None:
        """All at once; where there is no room for all, none of it stays."""
        content = "".join(json.dumps(record) + "\n" for record in records).encode()
        size = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._file.truncate(size)
            raise _cannot_write(self.path, error) from error


def write_rows(out: Path, rows: Sequence[dict[str, Any]]) -> None:
    """The finished file: it appears whole, by one rename, or not at all.

    Raises:
        DataError: it cannot be written.
    """
    unfinished = out.with_name(f".{out.name}.finished")
    try:
        with unfinished.open("wb") as stream:
            for row in rows:
                stream.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
            stream.flush()
            os.fsync(stream.fileno())
        unfinished.rename(out)
    except OSError as error:
        raise _cannot_write(out, error) from error


def _cannot_write(path: Path, error: OSError) -> DataError:
    return DataError(
        f"--out: {path} cannot be written ({error.strerror or error}); make room, or give another name. What was "
        "sampled stays, and the same command goes on from there"
    )
