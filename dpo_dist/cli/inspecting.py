"""`dpo-dist inspect`: what is wrong with the data of a run, in full."""

import json
from dataclasses import dataclass
from pathlib import Path

from dpo_dist.cli.describe import counted
from dpo_dist.cli.reading import held_out_sets, tokenizer_of, training_set
from dpo_dist.config import RunConfig
from dpo_dist.errors import DataError
from dpo_dist.inspection import DatasetReport, Finding, Settings, inspect_datasets
from dpo_dist.near import is_available
from dpo_dist.pretrained import load_config, resolve_folder
from dpo_dist.tokenization import TokenizedDataset, TokenizerSpec

_SHOWN = 3  # places
_BAR = 40  # letters
_INSTALL = "pip install 'dpo-dist[inspect]'"


@dataclass(frozen=True)
class Inspected:
    """The data sets as they were read; the first one is trained on."""

    config: RunConfig
    tokenizer: TokenizerSpec
    datasets: dict[str, TokenizedDataset]
    refusal: str
    """Why a run would not read them; "" if it would."""


def read(config: RunConfig, cache_dir: Path) -> Inspected:
    """Tokenise the data, or find them in the cache; loads no model.

    Rows stay apart, whatever data.group_by_prompt says. Where bad rows would refuse the run, they are left out here.

    Raises:
        DpoDistError: the configuration names what is not there, or a file is damaged.
    """
    model, key = config.model, "model.model_name_or_path"
    folder = resolve_folder(model.model_name_or_path, key, model.revision, cache_dir)
    model_config = load_config(folder, model.trust_remote_code)
    tokenizer = tokenizer_of(config, folder, cache_dir)

    def datasets(**changes: object) -> dict[str, TokenizedDataset]:
        data = config.data.model_copy(update={"group_by_prompt": False, **changes})
        changed = config.model_copy(update={"data": data})
        first = training_set(changed, tokenizer, model_config, cache_dir)
        return {"data.train": first, **held_out_sets(changed, tokenizer, model_config, cache_dir)}

    try:
        return Inspected(config, tokenizer, datasets(), "")
    except DataError as error:
        if config.data.on_bad_row == "skip":
            raise
        # A fault of a file hides what is behind it, and is met again.
        return Inspected(config, tokenizer, datasets(on_bad_row="skip"), str(error))


def inspect(inspected: Inspected, near: float) -> tuple[list[DatasetReport], str]:
    """A report of every data set; and what could not be looked for, "" if nothing."""
    finds_near = is_available()
    missing = "" if finds_near else f"near duplicates are not looked for: {_INSTALL}"
    return inspect_datasets(inspected.datasets, Settings(near, finds_near)), missing


def as_json(inspected: Inspected, reports: list[DatasetReport], near: float, missing: str) -> str:
    """All of it as one object."""
    values = {
        "near_threshold": near,
        "not_looked_for": missing or None,
        "refused_by_a_run": inspected.refusal or None,
        "datasets": {report.name: report.as_json() for report in reports},
    }
    return json.dumps(values, indent=1)


def as_text(inspected: Inspected, reports: list[DatasetReport], missing: str) -> str:
    """The same for a terminal, with the first places of each finding."""
    lines = [line for report in reports for line in (*_lines_of(report), "")]
    if missing:
        lines.append(f"note: {missing}")
    if inspected.refusal:
        lines.append(f"note: a run with data.on_bad_row=error refuses these data:\n{inspected.refusal}")
    return "\n".join(lines).rstrip()


def _lines_of(report: DatasetReport) -> list[str]:
    of = f"{counted(report.pairs, 'pair')} of {counted(report.prompts, 'different prompt')}"
    lines = [f"{report.name}: {counted(report.examples, 'example')}, {of}", *_findings_table(report.findings)]
    for rule in report.rules:
        share = "tells none apart" if rule.right is None else f"right in {rule.right:.0%} of {rule.decides:,} pairs"
        lines.append(f"the rule that {rule.says} is better: {share}")
    lines += [f"rows left out: {count} x {reason}" for reason, count in report.left_out.items()]
    lines += [f"note: {note}" for note in (*report.notes, *report.remarks)]
    if report.ignored_columns:
        lines.append(f"columns ignored: {', '.join(report.ignored_columns)}")
    lines.append(f"data.max_length={report.max_length} would keep 99 % of the examples")
    for part, one in report.histograms.items():
        lines.append(f"{part}, tokens (the longest {one.largest:,})")
        most = max(one.counts)
        for place, count in enumerate(one.counts):
            if count:
                bar = "#" * max(1, round(_BAR * count / most))
                lines.append(f"  {place * one.width:>7,}  {count:>9,}  {bar}")
    return lines


def _findings_table(findings: tuple[Finding, ...]) -> list[str]:
    width = max((len(finding.means) for finding in findings), default=0)
    lines = []
    for finding in findings:
        share = f"{finding.count:>7,}  {finding.count / finding.of:>6.1%}" if finding.of else f"{0:>7}"
        lines.append(f"  {finding.means:<{width}}  {share}")
        if finding.count:
            lines.append(f"    as in {_places(finding)}")
    return lines


def _places(finding: Finding) -> str:
    shown = [
        one.source if one.other_source in (None, one.source) else f"{one.source} beside {one.other_source}"
        for one in finding.occurrences[:_SHOWN]
    ]
    return ", ".join(shown)
