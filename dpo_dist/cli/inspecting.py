"""`dpo-dist inspect`: what is wrong with the data of a run, in full."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_dist.cli.describe import counted
from dpo_dist.cli.reading import datasets_of, tokenizer_if_any, tokenizer_of
from dpo_dist.cli.starting import importing
from dpo_dist.config import RunConfig
from dpo_dist.data import Source, open_source
from dpo_dist.errors import DataError
from dpo_dist.inspection import DatasetReport, Finding, Settings, inspect_datasets
from dpo_dist.inspection.cleaning import faulty_examples, judged_rows, output_paths, require_one_form, write_cleaned
from dpo_dist.inspection.doubts import LISTED, Doubts
from dpo_dist.inspection.output import require_possible, written
from dpo_dist.inspection.page import page
from dpo_dist.near import is_available
from dpo_dist.pretrained import load_config, resolve_folder
from dpo_dist.tokenization import Encoder, Sample, TokenizedDataset, TokenizerSpec, load_tokenizer

if TYPE_CHECKING:
    from dpo_dist.cli.doubting import Asked

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
        found = datasets_of(changed, tokenizer, cache_dir / "data", model_config.vocab_size)
        return {"data.train": found.training, **found.held_out}

    try:
        return Inspected(config, tokenizer, datasets(), "")
    except DataError as error:
        if config.data.on_bad_row == "skip":
            raise
        # A fault of a file hides what is behind it, and is met again.
        return Inspected(config, tokenizer, datasets(on_bad_row="skip"), str(error))


@dataclass(frozen=True)
class Wanted:
    """What a user asked for.

    Attributes:
        near: likeness from which on texts are near duplicates.
        model: that is asked which labels it contradicts, as `doubting.Asked` has it; None: none is.
        as_json: one object instead of text.
        fix: where the cleaned rows go.
        html: where the page goes.
        overwrite: replace files that are there.
    """

    near: float
    model: str | None
    as_json: bool
    fix: Path | None
    html: Path | None
    overwrite: bool


def report(config: RunConfig, cache_dir: Path, wanted: Wanted) -> str:
    """What is printed; the files that were asked for are written.

    Raises:
        DpoDistError: a mistake of the user.
    """
    fixing = Fix(config, cache_dir, wanted.fix, wanted.overwrite) if wanted.fix is not None else None
    if wanted.html is not None:
        require_possible(f"--html={wanted.html}", wanted.html, _all_opened(config, cache_dir), wanted.overwrite)
    if fixing is not None:
        # What is written is to be trained on as it is read here: all of it.
        config = config.model_copy(update={"data": config.data.model_copy(update={"holdout": 0.0})})
    asked = _asked(config, cache_dir, wanted.model)
    inspected = read(config, cache_dir)
    settings = Settings(wanted.near, is_available())
    missing = "" if settings.finds_near else f"near duplicates are not looked for: {_INSTALL}"
    reports = inspect_datasets(inspected.datasets, settings)
    if asked is not None:
        doubts = asked.doubts(inspected.datasets["data.train"], inspected.tokenizer)
        unasked = () if doubts else ("the model was not asked: it judges pairs, and data.train has none",)
        reports[0] = replace(reports[0], doubts=doubts, remarks=(*reports[0].remarks, *unasked))
    done = [fixing.write(inspected, settings)] if fixing is not None else []
    if wanted.html is not None:
        _write_page(wanted.html, inspected, reports, missing)
        done.append(f"page written to {wanted.html}")
    if wanted.as_json:
        return as_json(inspected, reports, wanted.near, missing, done)
    return "\n".join([as_text(inspected, reports, missing), *done])


def _asked(config: RunConfig, cache_dir: Path, name: str | None) -> "Asked | None":
    if name is None:
        return None
    with importing():  # of model classes, which nothing else here needs
        from dpo_dist.cli.doubting import Asked

    return Asked(config, cache_dir, name)


def _write_page(path: Path, inspected: Inspected, reports: list[DatasetReport], missing: str) -> None:
    tokenizer = tokenizer_if_any(inspected.tokenizer)

    def sample_of(name: str, example: int) -> Sample:
        return inspected.datasets[name].sample(example, tokenizer)

    refusal = f"A run with data.on_bad_row=error refuses these data: {inspected.refusal}" if inspected.refusal else ""
    text = page(reports, sample_of, [note for note in (missing, refusal) if note])
    with written(f"--html={path}", path) as (stream,):
        stream.write(text.encode("utf-8", errors="replace"))


class Fix:
    """The cleaned rows of data.train, to be written; mistakes are found before anything is read.

    Args:
        config: of the run.
        cache_dir: of dpo-dist.
        out: the file of rows.
        overwrite: replace what is there.
    Raises:
        DpoDistError: the files cannot be written, or the sources are not of one form.
    """

    def __init__(self, config: RunConfig, cache_dir: Path, out: Path, overwrite: bool) -> None:
        self._sources = _opened(config, cache_dir, "train")
        self._out, self._reasons = output_paths(out, _all_opened(config, cache_dir), overwrite)
        require_one_form(self._sources)

    def write(self, inspected: Inspected, settings: Settings) -> str:
        """Write both files; returns what was done, in words."""
        config, (training, *held_out) = inspected.config, inspected.datasets.values()
        needs_tokenizer = not self._sources[0].holds_token_ids()
        spec = inspected.tokenizer
        encoder = Encoder(config.data, load_tokenizer(spec) if needs_tokenizer else None, f"{spec.key}={spec.path}")
        faulty = faulty_examples(training, held_out, settings)
        rows = judged_rows(
            self._sources, training, encoder, faulty, config.data.pairing, config.trains_on_demonstrations
        )
        done = write_cleaned(rows, self._out, self._reasons)
        reasons = ", ".join(f"{count} x {reason}" for reason, count in done.dropped.items())
        dropped = sum(done.dropped.values())
        left_out = (
            f"; {counted(dropped, 'row')} left out, with reasons in {done.reasons} ({reasons})" if dropped else ""
        )
        return f"{counted(done.kept, 'row')} written to {done.path}{left_out}"


def _all_opened(config: RunConfig, cache_dir: Path) -> list[Source]:
    return [*_opened(config, cache_dir, "train"), *_opened(config, cache_dir, "evaluation")]


def _opened(config: RunConfig, cache_dir: Path, section: str) -> list[Source]:
    entries = getattr(config.data, section)
    return [
        open_source(source, f"data.{section}.{index}", cache_dir=cache_dir / "data")
        for index, source in enumerate(entries)
    ]


def as_json(inspected: Inspected, reports: list[DatasetReport], near: float, missing: str, done: list[str]) -> str:
    """All of it as one object."""
    values = {
        "near_threshold": near,
        "not_looked_for": missing or None,
        "refused_by_a_run": inspected.refusal or None,
        "written": done,
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
    if report.doubts is not None:
        lines += _doubts_table(report.doubts)
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


def _doubts_table(doubts: Doubts) -> list[str]:
    lines = [
        f"  {doubts.means}: {doubts.count:,}, {doubts.count / doubts.of:.1%}",
        f"    it prefers the chosen completion of {doubts.prefers_chosen:.0%} of the pairs; median difference "
        f"{doubts.median:.3f} nats per token",
    ]
    if doubts.ranked:
        lines.append("    pairs whose rejected completion it prefers most, in nats per token; * strongly")
        lines.append(f"      {'chosen':>9}{'rejected':>10}{'difference':>12}{'robust z':>10}")
    for one in doubts.ranked[:LISTED]:
        numbers = f"{one.chosen_mean_logps:>9.3f}{one.rejected_mean_logps:>10.3f}{one.difference:>12.3f}"
        lines.append(f"    {'*' if one.is_strong else ' '} {numbers}{one.robust_z:>10.1f}  {one.source}")
    if doubts.count > LISTED:
        lines.append(f"    and {doubts.count - LISTED:,} more, which --json lists")
    return [*lines, *(f"note: {remark}" for remark in doubts.remarks)]


def _places(finding: Finding) -> str:
    shown = [
        one.source if one.other_source in (None, one.source) else f"{one.source} beside {one.other_source}"
        for one in finding.occurrences[:_SHOWN]
    ]
    return ", ".join(shown)
