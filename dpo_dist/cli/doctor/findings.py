"""What the doctor finds: one thing each, with its status, as a line for people and as JSON for programs."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, Literal

from dpo_dist.cli.redaction import redacted, redacted_values

Status = Literal["ok", "warning", "problem"]
STATUSES: tuple[Status, ...] = ("ok", "warning", "problem")
SCHEMA_VERSION = 1
_STATUS_WIDTH, _NAME_WIDTH = 8, 20  # characters of a column


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    section: str
    """Findings of one section are shown together."""
    name: str
    text: str
    status: Status = "ok"
    way_out: str = ""
    """What to do about it; a problem always has one."""
    values: dict[str, Any] = field(default_factory=dict)
    """The same in numbers and lists, for programs."""
    ranks: tuple[int, ...] = ()
    """The ranks that it was found on; empty: the first one, or all together."""


def as_finding(values: dict[str, Any]) -> Finding:
    """What was JSON on its way from another rank."""
    return Finding(**{**values, "ranks": tuple(values["ranks"])})


def worst(findings: Iterable[Finding]) -> Status:
    """The status of them all."""
    found = {finding.status for finding in findings}
    return "problem" if "problem" in found else "warning" if "warning" in found else "ok"


def exit_code(findings: Iterable[Finding]) -> int:
    """0 where training can start, else 2."""
    return 2 if worst(findings) == "problem" else 0


def merged(everybody: Sequence[Sequence[Finding]]) -> list[Finding]:
    """All that the first rank found, and what is not in order on others; the same on several ranks once.

    Args:
        everybody: findings of every rank, in rank order.
    """
    first = list(everybody[0]) if everybody else []
    others: dict[str, tuple[Finding, list[int]]] = {}
    for rank, theirs in enumerate(everybody[1:], start=1):
        for finding in theirs:
            if finding.status == "ok" or finding in first:
                continue
            key = json.dumps([finding.section, finding.name, finding.status, finding.text])
            others.setdefault(key, (finding, []))[1].append(rank)
    return first + [replace(finding, ranks=tuple(ranks)) for finding, ranks in others.values()]


def as_json(findings: Sequence[Finding], num_ranks: int) -> str:
    """One JSON object on one line; docs/doctor.md has its keys."""
    report = {
        "schema_version": SCHEMA_VERSION,
        "status": worst(findings),
        "can_start": exit_code(findings) == 0,
        "num_ranks": num_ranks,
        "findings": [{**vars(finding), "ranks": list(finding.ranks)} for finding in findings],
    }
    return json.dumps(redacted_values(report))


def as_text(findings: Sequence[Finding]) -> str:
    """A line for each finding, in sections, and a last one that says whether training can start."""
    lines = []
    sections = list(dict.fromkeys(finding.section for finding in findings))
    ordered = sorted(findings, key=lambda finding: sections.index(finding.section))
    for section, members in groupby(ordered, key=lambda finding: finding.section):
        lines.append(section)
        for finding in members:
            lines += _lines_of(finding)
    counts = {status: sum(finding.status == status for finding in findings) for status in STATUSES}
    can_start = "training cannot start here" if counts["problem"] else "training can start here"
    lines.append(f"{can_start}: {counts['problem']} problem(s), {counts['warning']} warning(s)")
    return redacted("\n".join(lines))


def describe_ranks(ranks: Sequence[int]) -> str:
    """`rank 3`, or `ranks 0-7, 9`."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    shown = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


def _lines_of(finding: Finding) -> list[str]:
    where = f"{describe_ranks(finding.ranks)}: " if finding.ranks else ""
    lines = [f"  {finding.status:{_STATUS_WIDTH}}{finding.name:{_NAME_WIDTH}} {where}{finding.text}"]
    if finding.way_out:
        lines.append(f"  {'':{_STATUS_WIDTH + _NAME_WIDTH}} -> {finding.way_out}")
    return lines
