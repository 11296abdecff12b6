"""Rows of all sources written as one data set, under a temporary name until it is complete and on the disk."""

import logging
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from dpo_dist.config import DataConfig, Rated
from dpo_dist.data import RowFault, Source
from dpo_dist.data.example import CUT_ALIKE, OVER_LONG, TIED, UNPAIRED
from dpo_dist.durable import sync
from dpo_dist.errors import DataError
from dpo_dist.phases import inject
from dpo_dist.tokenization.bad_rows import BadRows, nothing_left
from dpo_dist.tokenization.gathering import Gathering
from dpo_dist.tokenization.journal import Journal, partial_folders
from dpo_dist.tokenization.processes import RowProcesses
from dpo_dist.tokenization.progress import telling
from dpo_dist.tokenization.ratings import RatedCompletions
from dpo_dist.tokenization.summary import EXAMPLES_FILE, SUMMARY_FILE
from dpo_dist.tokenization.writer import ExampleWriter

_LOGGER = logging.getLogger(__name__)


def write_dataset(
    folder: Path,
    sources: Sequence[Source],
    identities: Sequence[list[str]],
    data: DataConfig,
    processes: RowProcesses,
    place: str,
    rated: Rated,
) -> None:
    """Tokenise into a temporary folder, bring it to the disk, give it its name. Needs the lock."""
    if folder.exists():
        _LOGGER.warning("%s is damaged and is written again", folder)
        shutil.rmtree(folder)
    with partial_folders(folder) as (partial, earlier, state):
        writer, found = _begun(partial, earlier, state, RatedCompletions(data.pairing, rated == "rest"), rated)
        with closing(writer):
            found.journal = Journal(partial)
            first = found.entry
            for found.entry, source in enumerate(sources[first:], first):
                found.num_read += _write_source(source, data, processes, writer, found, source is sources[-1])
            if found.refused.total:
                raise DataError(found.refused.refusal(place, found.num_read))
            _require_unchanged(sources, identities)
            notes = dict(sorted(found.notes.items()))
            writer.finish(dict(sorted(found.bad_rows.items())), notes, sorted(found.ignored))
        found.journal.remove()
        for name in (EXAMPLES_FILE, SUMMARY_FILE, "."):
            sync(partial / name)
        partial.rename(folder)
        sync(folder.parent)
    _LOGGER.info(
        "tokenised %s examples, %s tokens, into %s", f"{writer.num_examples:,}", f"{writer.num_tokens:,}", folder
    )


def _require_unchanged(sources: Sequence[Source], identities: Sequence[list[str]]) -> None:
    """The folder's name says what was in the files before they were read: it must be so still."""
    for source, before in zip(sources, identities, strict=True):
        if source.identity() != before:
            raise DataError(
                f"{source.key}.path={source.name} changed while it was read; wait until it is complete, and start again"
            )


@dataclass
class _Here:
    """How far a source has been read."""

    num_rows: int = 0
    num_read: int = 0
    """Of them those in the part."""
    num_taken: int = 0
    left_out: dict[str, int] = field(default_factory=dict[str, int])


@dataclass
class _Found:
    """What is told of the rows of all sources, and those of them that wait for others."""

    rated: RatedCompletions
    kind: Rated
    entry: int = 0
    """Of the source that is read."""
    num_read: int = 0
    refused: BadRows = field(default_factory=BadRows)
    bad_rows: Counter[str] = field(default_factory=Counter[str])
    """Those left out, by reason."""
    notes: Counter[str] = field(default_factory=Counter[str])
    ignored: set[str] = field(default_factory=set[str])
    here: _Here = field(default_factory=_Here)
    """Where the source that is read first was left."""
    journal: Journal = field(init=False)

    def can_be_gone_on_from(self, data: DataConfig) -> bool:
        """Whether it is time to write down how far this is, and all that is known is in that."""
        return self.journal.is_due and not data.group_by_prompt and self.rated.is_empty and not self.refused.total

    def to_json(self) -> dict[str, Any]:
        """What `_begun` reads."""
        told = {"bad_rows": dict(self.bad_rows), "notes": dict(self.notes), "ignored": sorted(self.ignored)}
        return {"entry": self.entry, "num_read": self.num_read, **told}


def _begun(
    partial: Path, earlier: Path | None, state: dict[str, Any], rated: RatedCompletions, kind: Rated
) -> tuple[ExampleWriter, _Found]:
    """A writer, and what is known: new, or as another process left them that was killed."""
    writer = ExampleWriter(partial)
    if earlier is None:
        return writer, _Found(rated, kind)
    try:
        writer.restore(earlier, state)
        bad_rows, notes = Counter(state["bad_rows"]), Counter(state["notes"])
        told = (state["num_read"], BadRows(), bad_rows, notes, set(state["ignored"]), _Here(**state["here"]))
        found = _Found(rated, kind, state["entry"], *told)
    except (ValueError, KeyError, TypeError, OSError, pa.ArrowException) as error:
        _LOGGER.warning("%s cannot be gone on from (%s); all rows are tokenised again", earlier, error)
        writer.close()
        return ExampleWriter(partial), _Found(rated, kind)
    _LOGGER.info("going on after %s examples that were tokenised before", f"{writer.num_examples:,}")
    return writer, found


def _write_source(
    source: Source, data: DataConfig, processes: RowProcesses, writer: ExampleWriter, found: _Found, is_last: bool
) -> int:
    """Write the examples of a source, and count its bad rows: those left out, and those that refuse the run.

    Returns:
        How many rows were read.
    """
    left_out = BadRows()
    gathering = Gathering(writer.write, data, found.rated, found.kind, found.entry)
    here, found.here = found.here, _Here()
    left_out.counts.update(here.left_out)
    gathering.num_taken, num_read = here.num_taken, here.num_read
    with telling(source, here.num_read) as tell:
        for encoded in processes.encoded(islice(source.rows(), here.num_rows, None)):
            inject("tokenise")
            here.num_rows += encoded.num_rows
            found.notes.update(encoded.notes)
            found.ignored |= encoded.ignored
            for result in encoded.results:
                num_read += 1
                if isinstance(result, RowFault):
                    (left_out if _is_left_out(result, data) else found.refused).add(result)
                elif not found.refused.total:  # else only the bad ones matter from here on
                    gathering.add(result)
            tell(num_read, writer.num_tokens)
            if found.can_be_gone_on_from(data) and gathering.num_taken:
                here = _Here(here.num_rows, num_read, gathering.num_taken, dict(left_out.counts))
                found.journal.write({**writer.state(), **found.to_json(), "here": asdict(here)})
    found.notes.update(gathering.finish(is_last))
    counts = left_out.counts + Counter({UNPAIRED: found.rated.num_unpaired})
    reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(counts.items()))
    has_some = gathering.num_taken > 0 or found.refused.total > 0
    waits = gathering.num_rated > 0 and (not is_last or writer.num_examples > 0)
    is_held_out = source.part == "trained" and num_read == 0 and writer.num_examples > 0
    if not (has_some or waits or is_held_out):
        raise nothing_left(source, data, num_read, reasons, left_out)
    if counts:
        _LOGGER.warning("%s: %d of %d rows left out (%s)", source.key, counts.total(), num_read, reasons)
    found.bad_rows.update(counts)
    return num_read


def _is_left_out(fault: RowFault, data: DataConfig) -> bool:
    # Completions that are all equally good, or were cut to the same, are no mistake of the data.
    is_expected = fault.reason in (TIED, CUT_ALIKE) or (fault.reason == OVER_LONG and data.truncation_mode != "error")
    return data.on_bad_row == "skip" or is_expected
