"""The rows of data.train that are not at fault, in a file; and in another one why the others are not in it."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_dist.config import Pairing
from dpo_dist.data import PreferenceExample, RowFault, Source
from dpo_dist.errors import ConfigError, DataError
from dpo_dist.inspection import findings
from dpo_dist.inspection.columns import PairColumns
from dpo_dist.inspection.findings import Finding
from dpo_dist.inspection.output import require_possible, written
from dpo_dist.inspection.report import Settings
from dpo_dist.tokenization import Encoder, TokenizedDataset

HELD_OUT, NEARLY_HELD_OUT = "held_out_prompt", "near_held_out_prompt"
_SUFFIX = ".jsonl"


@dataclass(frozen=True)
class Dropped:
    """A row that is left out.

    Attributes:
        source: `path:line`.
        reason: one of the kinds of findings, or the reason of a bad row.
        what: is wrong with it, in words.
        other: the row that it repeats or contradicts, or whose prompt it has.
    """

    source: str
    reason: str
    what: str
    other: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What was written."""

    kept: int
    dropped: Mapping[str, int]
    path: Path
    reasons: Path


def output_paths(out: Path, sources: Iterable[Source], overwrite: bool) -> tuple[Path, Path]:
    """Where rows and reasons go.

    Raises:
        ConfigError: they cannot be written there, or something is there that nobody said may go.
    """
    if out.suffix != _SUFFIX:
        raise ConfigError(f"--fix={out} is no JSON Lines file; give a name that ends with {_SUFFIX}")
    paths = out, out.with_suffix(f".dropped{_SUFFIX}")
    read = list(sources)
    for path in paths:
        require_possible(f"--fix={out}", path, read, overwrite)
    return paths


def require_one_form(sources: Iterable[Source]) -> None:
    """Rows of several sources become those of one.

    Raises:
        ConfigError: they could not be read as one.
    """
    first, *others = sources
    for other in others:
        if dict(other.columns.paths) != dict(first.columns.paths):
            raise ConfigError(f"--fix: {other.key} has other columns than {first.key}; clean them one by one")
        if other.holds_token_ids() != first.holds_token_ids():
            raise ConfigError(f"--fix: of {first.key} and {other.key} only one holds token ids; clean them one by one")


def faulty_examples(
    training: TokenizedDataset, held_out: Iterable[TokenizedDataset], settings: Settings
) -> dict[int, Dropped]:
    """Examples to leave out, each for the first of its reasons: prompt held out, contradiction, repeat, near repeat.

    A row with several pairs is left out as a whole where one of them is at fault. Of repeats the first row stays.
    """
    columns, found = PairColumns(training), dict[int, Dropped]()

    def drop(finding: Finding, reason: str, what: str) -> None:
        for one in finding.occurrences:
            found.setdefault(one.example, Dropped(one.source, reason, what, one.other_source))

    # Seen from the training side: its prompts are looked up among the held-out ones.
    for other in map(PairColumns, held_out):
        drop(findings.shared_prompts(columns, other), HELD_OUT, "its prompt is held out")
        if settings.finds_near:
            near = findings.nearly_shared_prompts(columns, other, settings.near, columns.common)
            drop(near, NEARLY_HELD_OUT, "its prompt is nearly one that is held out")
    if not len(columns.example):
        return found
    drop(findings.contradicting(columns), "contradicting", "another row prefers the opposite, alone or with others")
    first: dict[tuple[int, int], int] = {}
    chosen, rejected = columns.numbers
    for example, pairs in findings.pairs_by_example(columns):
        said = [(int(chosen[pair]), int(rejected[pair])) for pair in pairs]
        earlier = next((first[one] for one in said if one in first), None)
        if example in found:
            continue
        if earlier is None:
            first.update(dict.fromkeys(said, example))
        else:
            source, other = columns.source_of(example), columns.source_of(earlier)
            found[example] = Dropped(source, "repeated", "an earlier row says the same", other)
    if settings.finds_near:
        drop(findings.near_pairs(columns, settings.near, found), "near_pairs", "an earlier row says nearly the same")
    return found


def judged_rows(
    sources: Iterable[Source],
    dataset: TokenizedDataset,
    encoder: Encoder,
    faulty: Mapping[int, Dropped],
    pairing: Pairing = "all",
    demonstrations: bool = False,
) -> Iterator[dict[str, Any] | Dropped]:
    """Every row that is read, in order: as it stands in the file, or why it is left out.

    The examples of the data set are those of the rows that can be used, in the same order.
    """
    example = 0
    for source in sources:
        for (where, row), parsed in zip(source.raw_rows(), source.examples(None, pairing, demonstrations), strict=True):
            if isinstance(parsed, PreferenceExample) and parsed.rating is not None:
                raise DataError(
                    f"--fix: {where} holds a completion that is only called good or bad, in no pair of its own; "
                    "leave --fix out, or name the sources that hold pairs"
                )
            if not isinstance(parsed, RowFault) and example < len(dataset) and dataset.source_of(example) == where:
                yield faulty.get(example) or _whole(row)
                example += 1
                continue
            yield _dropped(parsed, encoder)
    if example != len(dataset):
        raise DataError("--fix: the data changed while they were read; wait until they are complete, and start again")


def write_cleaned(rows: Iterable[dict[str, Any] | Dropped], out: Path, reasons: Path) -> Outcome:
    """Write both files.

    Raises:
        DataError: there is no room for them.
    """
    counts: Counter[str] = Counter()
    kept = 0
    with written(f"--fix={out}", out, reasons) as (good, bad):
        for row in rows:
            if isinstance(row, Dropped):
                counts[row.reason] += 1
                bad.write(_line(vars(row)))
            else:
                kept += 1
                good.write(_line(row))
    return Outcome(kept, dict(sorted(counts.items())), out, reasons)


def _line(values: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(values, ensure_ascii=False, default=str).encode("utf-8") + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair in a column that nobody reads
        return json.dumps(values, default=str).encode("ascii") + b"\n"


def _whole(row: dict[str, Any] | RowFault) -> dict[str, Any]:
    assert not isinstance(row, RowFault)
    return row


def _dropped(parsed: PreferenceExample | RowFault, encoder: Encoder) -> Dropped:
    """Why a row is no example: as text, or as tokens."""
    fault = parsed if isinstance(parsed, RowFault) else encoder.encode([parsed])[0]
    if not isinstance(fault, RowFault):
        raise DataError(f"{fault.source}: the row changed while it was read; wait until the file is complete")
    return Dropped(fault.source, fault.reason, fault.what)
