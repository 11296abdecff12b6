"""What `dpo-dist feedback` does: read logs, add what they say to a set, and tell of it."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dpo_dist.cli.describe import counted
from dpo_dist.data import RowFault
from dpo_dist.data.example import TIED, RowError, fault_of
from dpo_dist.data.files import data_suffix, read_rows
from dpo_dist.data.mapping import ColumnPaths
from dpo_dist.errors import DataError
from dpo_dist.feedback import EVENT_COLUMNS, KINDS, Added, FeedbackSet, Version, statements_of
from dpo_dist.feedback.store import Entry
from dpo_dist.tokenization.bad_rows import BadRows

_SHOWN = 3


def run_add(logs: list[Path], to: Path, columns: list[str], weight: list[str], as_text: bool, skip_bad: bool) -> str:
    """Add what logs say to a set, and tell what became of it.

    Raises:
        DataError: a mistake in an option, or in a log; nothing has been added then.
    """
    weights, paths = _weights(weight), _paths(columns)
    entries, left_out, sources = _read(logs, paths, as_text, skip_bad)
    led_into = {path.split(".")[0] for one in paths for path in one.paths.values()}
    unread = sorted({name for entry in entries for name in entry.event} - EVENT_COLUMNS - led_into)
    lines = [f"columns not read: {', '.join(unread)}"] if unread else []
    return "\n".join([*lines, *_told(to, FeedbackSet(to).add(entries, sources, weights), left_out)])


def describe(folder: Path, as_json: bool) -> str:
    """The versions of a set, the oldest first.

    Raises:
        DataError: there is none.
    """
    versions = FeedbackSet(folder).versions()
    if not versions:
        raise DataError(f"{folder} holds no feedback; add some with `dpo-dist feedback add LOG --to {folder}`")
    if as_json:
        return json.dumps({"versions": [asdict(version) for version in versions]}, indent=2)
    return "\n".join(f"{_named(version)}, added {version.added}, from {_logs(version)}" for version in versions)


def _weights(given: list[str]) -> dict[str, float]:
    found = {}
    for one in given:
        kind, _, text = one.partition("=")
        if kind not in KINDS or kind == "thumbs":
            raise DataError(
                f"--weight {one}: {kind} is no kind of which rows have a weight; give one of "
                f"{', '.join(known for known in KINDS if known != 'thumbs')}"
            )
        try:
            found[kind] = float(text)
        except ValueError:
            found[kind] = 0.0
        if not 0 < found[kind] < float("inf"):
            raise DataError(f"--weight {one}: {text!r} is not a number above 0; give one, such as {kind}=0.5")
    return found


def _paths(given: list[str]) -> list[ColumnPaths]:
    found = []
    for one in given:
        name, equals, path = one.partition("=")
        if not (name and equals and path):
            raise DataError(f"--columns {one}: give NAME=PATH, such as prompt=request.messages")
        if name not in EVENT_COLUMNS:
            raise DataError(
                f"--columns {one}: {name} is nothing that an event has; give the path of one of "
                f"{', '.join(sorted(EVENT_COLUMNS))}"
            )
        found.append(ColumnPaths("--columns", {name: path}))
    return found


def _read(
    logs: list[Path], paths: list[ColumnPaths], as_text: bool, skip_bad: bool
) -> tuple[list[Entry], BadRows, list[dict[str, Any]]]:
    """All that the logs say; what is left out of them; their names and digests.

    Raises:
        DataError: a log cannot be read, or holds events that cannot be used.
    """
    entries: list[Entry] = []
    left_out, refused, sources, num_events = BadRows(), BadRows(), [], 0
    for log in logs:
        before = num_events
        for where, event in _events(log, paths):
            num_events += 1
            found = event if isinstance(event, RowFault) else statements_of(event, where, as_text)
            if isinstance(found, RowFault):
                (left_out if skip_bad or found.reason == TIED else refused).add(found)
            elif not isinstance(event, RowFault):
                entries += [Entry(statement, where, event) for statement in found]
        with log.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        sources.append({"name": _shown(log), "sha256": digest, "events": num_events - before})
    if refused.total:
        text = refused.refusal("LOG", num_events).replace("set data.on_bad_row=skip", "give --skip-bad")
        raise DataError(text)
    return entries, left_out, sources


def _events(log: Path, paths: list[ColumnPaths]) -> Iterator[tuple[str, dict[str, Any] | RowFault]]:
    if not log.is_file():
        raise DataError(f"LOG={log} is no file; give logs as .jsonl or .json, plain, .gz or .zst")
    if data_suffix(log) not in (".jsonl", ".json"):
        raise DataError(f"LOG={log} is not JSON by its name; give logs as .jsonl or .json, plain, .gz or .zst")
    for line, event in read_rows(log, _shown(log)):
        where = f"{_shown(log)}:{line}"
        try:
            yield where, event if isinstance(event, RowFault) else _renamed(event, paths, where)
        except RowError as error:
            yield where, fault_of(error, where)


def _shown(log: Path) -> str:
    """Its name as text, whatever bytes it has."""
    return os.fsencode(log).decode("utf-8", "replace")


def _renamed(event: dict[str, Any], paths: list[ColumnPaths], where: str) -> dict[str, Any]:
    """The event with columns under our names; events of other kinds need not have them all."""
    found = dict(event)
    for one in paths:
        (name, path), *_ = one.paths.items()
        if path in event or path.split(".")[0] in event:
            found[name] = one.renamed(event, where)[name]
    return found


def _told(folder: Path, added: Added, left_out: BadRows) -> list[str]:
    lines = []
    if added.num_repeated:
        lines.append(f"{counted(added.num_repeated, 'statement')} said before, and not added again")
    if left_out.total:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(left_out.counts.items()))
        lines.append(f"{counted(left_out.total, 'event')} left out ({reasons})")
    if added.contradicting:
        shown = ", ".join(added.contradicting[:_SHOWN])
        lines.append(f"note: rows that contradict another: {len(added.contradicting)}, as in {shown}")
    if added.version is None:
        return [*lines, f"nothing new for {folder}"]
    versions = FeedbackSet(folder).versions()
    total = counted(sum(version.num_rows for version in versions), "row")
    return [
        *lines,
        f"{folder}: {_named(added.version)}",
        f"{total} in {counted(len(versions), 'version')}; train on them with data.train.0.path={folder}",
    ]


def _named(version: Version) -> str:
    kinds = ", ".join(f"{kind}: {count}" for kind, count in version.kinds.items())
    against = f"; {version.num_contradicting} contradict others" if version.num_contradicting else ""
    return f"version {version.number} of {counted(version.num_rows, 'row')} ({kinds}{against})"


def _logs(version: Version) -> str:
    names = Counter(str(source["name"]) for source in version.sources)
    return ", ".join(names)
