"""A report as one HTML page, which needs no network and no script. Texts of the data are escaped, all of them."""

from collections.abc import Callable, Mapping, Sequence
from html import escape

from dpo_dist.inspection.doubts import LISTED, Doubt, Doubts
from dpo_dist.inspection.findings import Finding, Occurrence
from dpo_dist.inspection.histogram import drawn
from dpo_dist.inspection.report import DatasetReport
from dpo_dist.tokenization import Sample

_EXAMPLES = 3  # of each finding
_LETTERS = 600  # of each text

# Of a data set's name and an example's number.
SampleOf = Callable[[str, int], Sample]
# The sets whose rows a finding of a held-out set is held against.
_ACROSS = ("held_out_prompts", "near_held_out_prompts")

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --quiet: #5c6773; --line: #d4d9df; --bar: #1f6fb4;
  --box: #f4f6f8; --bad: #a8321f; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ec; --paper: #14181d; --quiet: #9aa5b1; --line: #39424c; --bar: #5aa9e6; --box: #1d232a;
    --bad: #ff9b85; }
}
body { font: 15px/1.5 sans-serif; color: var(--ink); background: var(--paper); max-width: 1000px; margin: 2em auto;
  padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.25em; margin-top: 2em; border-bottom: 1px solid var(--line); }
table { border-collapse: collapse; margin: 1em 0; }
th, td { text-align: left; padding: .3em 1em .3em 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; } tr.found td { color: var(--bad); }
.histograms { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 1em; }
.histogram { width: 100%; font: 12px sans-serif; } .histogram rect { fill: var(--bar); }
.histogram text { fill: var(--ink); } .histogram .title { font-size: 14px; font-weight: bold; }
.histogram .quiet { fill: var(--quiet); } .histogram line { stroke: var(--line); }
.beside { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 1em; margin: .5em 0 1.5em; }
.row { background: var(--box); padding: .6em .8em; min-width: 0; }
.row p { margin: 0 0 .6em; overflow-wrap: anywhere; } .row b { font-weight: normal; color: var(--quiet); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 0 .6em; font: 13px/1.4 monospace; }
summary { cursor: pointer; } .note { color: var(--quiet); }
"""


def page(reports: Sequence[DatasetReport], sample_of: SampleOf, notes: Sequence[str]) -> str:
    """The whole page.

    Args:
        reports: of all data sets; the first one is trained on.
        sample_of: the texts of an example.
        notes: what holds for all of them.
    """
    training = reports[0].name
    body = [part for report in reports for part in _dataset(report, training, sample_of)]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>Preference data</title><style>{_STYLE}</style></head><body>",
            "<h1>What is wrong with the preference data</h1>",
            *(f'<p class="note">{escape(note)}</p>' for note in notes),
            *body,
            "</body></html>",
            "",
        ]
    )


def _dataset(report: DatasetReport, training: str, sample_of: SampleOf) -> list[str]:
    counts = f"{report.examples:,} examples, {report.pairs:,} pairs of {report.prompts:,} different prompts"
    parts = [f"<h2>{escape(report.name)}</h2>", f"<p>{counts}</p>"]
    rows = [(finding.means, finding.count, _share(finding.count, finding.of)) for finding in report.findings]
    if (doubts := report.doubts) is not None:
        rows.append((doubts.means, doubts.count, _share(doubts.count, doubts.of)))
    if rows:
        parts.append(_table(("finding", "number", "share"), rows, marks=True))
    if report.rules:
        shares = [(rule.says, rule.decides, f"{rule.right:.0%}" if rule.decides else "") for rule in report.rules]
        parts.append(_table(("a rule that takes for better", "pairs it tells apart", "is right in"), shares))
    if report.left_out:
        rows = [(reason, count, "") for reason, count in report.left_out.items()]
        parts.append(_table(("rows left out, by reason", "number", ""), rows))
    parts += [f'<p class="note">{escape(note)}</p>' for note in (*report.notes, *report.remarks)]
    parts.append(f"<p>data.max_length={report.max_length} would keep 99 % of the examples.</p>")
    drawings = [drawn(part, one) for part, one in report.histograms.items()]
    parts.append(f'<div class="histograms">{"".join(f"<div>{one}</div>" for one in drawings)}</div>')
    for finding in report.findings:
        parts += _examples(report.name, training, finding, sample_of)
    if doubts is not None:
        parts += _doubts(report.name, doubts, sample_of)
    return parts


def _doubts(name: str, doubts: Doubts, sample_of: SampleOf) -> list[str]:
    said = f"{doubts.model} prefers the chosen completion of {doubts.prefers_chosen:.0%} of the pairs."
    parts = [f'<p class="note">{escape(note)}</p>' for note in (said, *doubts.remarks)]
    if not doubts.ranked:
        return parts
    listed = doubts.ranked[:LISTED]
    head = f"pairs whose rejected completion {doubts.model} prefers most, the first {len(listed)}"
    shown = "".join(_doubt(one, sample_of(name, one.example)) for one in listed)
    return [*parts, f"<details open><summary>{escape(head)}</summary>{shown}</details>"]


def _doubt(one: Doubt, sample: Sample) -> str:
    text = (
        f"completion {one.chosen} is chosen over completion {one.rejected}; log-probability per token "
        f"{one.chosen_mean_logps:.3f} and {one.rejected_mean_logps:.3f} nats, difference {one.difference:.3f}, "
        f"robust z {one.robust_z:.1f}{': strongly contradicted' if one.is_strong else ''}"
    )
    return f'<p class="note">{escape(text)}</p><div class="beside">{_row(sample)}</div>'


def _share(count: int, of: int) -> str:
    return f"{count / of:.1%}" if of else ""


def _table(head: Sequence[str], rows: Sequence[tuple[str, int, str]], marks: bool = False) -> str:
    lines = [f"<tr>{''.join(f'<th>{escape(one)}</th>' for one in head)}</tr>"]
    for name, number, share in rows:
        mark = ' class="found"' if marks and number else ""
        cells = f'<td>{escape(name)}</td><td class="number">{number:,}</td><td class="number">{escape(share)}</td>'
        lines.append(f"<tr{mark}>{cells}</tr>")
    return f"<table>{''.join(lines)}</table>"


def _examples(name: str, training: str, finding: Finding, sample_of: SampleOf) -> list[str]:
    if not finding.count:
        return []
    other_set = training if finding.kind in _ACROSS else name
    shown = [_occurrence(name, other_set, one, sample_of) for one in finding.occurrences[:_EXAMPLES]]
    more = f", the first {len(shown)}" if finding.count > len(shown) else ""
    head = f"{finding.means}: {finding.count:,}{more}"
    return [f"<details open><summary>{escape(head)}</summary>{''.join(shown)}</details>"]


def _occurrence(name: str, other_set: str, one: Occurrence, sample_of: SampleOf) -> str:
    rows = [_row(sample_of(name, one.example))]
    if one.other is not None and (other_set, one.other) != (name, one.example):
        rows.append(_row(sample_of(other_set, one.other)))
    return f'<div class="beside">{"".join(rows)}</div>'


def _row(sample: Sample) -> str:
    texts: Mapping[str, str] = {
        "prompt": sample.prompt,
        **{f"completion {number}": text for number, text in enumerate(sample.completions, start=1)},
    }
    parts = "".join(f"<b>{name}</b><pre>{escape(_beginning(text))}</pre>" for name, text in texts.items())
    return f'<div class="row"><p class="note">{escape(sample.source)}</p>{parts}</div>'


def _beginning(text: str) -> str:
    return text if len(text) <= _LETTERS else f"{text[:_LETTERS]} ..."
