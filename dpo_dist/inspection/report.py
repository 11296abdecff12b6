"""All that is found in the data sets of a run, as numbers and texts."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dpo_dist.inspection import findings
from dpo_dist.inspection.columns import PairColumns
from dpo_dist.inspection.doubts import Doubts
from dpo_dist.inspection.findings import Finding
from dpo_dist.inspection.lengths import Histogram, Rule, histograms, rules, suggested_length
from dpo_dist.tokenization import TokenizedDataset, describe_notes

FEWEST = 512  # pairs; with fewer a share says little
_LOPSIDED = 0.75  # a rule is right, or wrong, so often


@dataclass(frozen=True)
class Settings:
    """How the data are looked at.

    Attributes:
        near: likeness from which on texts are near duplicates.
        finds_near: whether they are looked for.
    """

    near: float
    finds_near: bool


@dataclass(frozen=True)
class DatasetReport:
    """One data set.

    Attributes:
        name: `data.train`, or that of a held-out set.
        examples, pairs, prompts: how many, prompts that differ.
        lengths: as `TokenizedDataset.stats`.
        histograms: tokens, by part.
        max_length: suggested, tokens.
        rules: how often those are right that read nothing.
        findings: all kinds that were looked for, also those with no occurrence.
        left_out: rows, by reason.
        notes: on rows that are used, a sentence each.
        ignored_columns: those that mean nothing here.
        remarks: what a share says, a sentence each.
        doubts: the labels that a model contradicts; None where none was asked.
    """

    name: str
    examples: int
    pairs: int
    prompts: int
    lengths: dict[str, dict[str, int | float]]
    histograms: dict[str, Histogram]
    max_length: int
    rules: tuple[Rule, ...]
    findings: tuple[Finding, ...]
    left_out: dict[str, int]
    notes: tuple[str, ...]
    ignored_columns: tuple[str, ...]
    remarks: tuple[str, ...]
    doubts: Doubts | None = None

    def as_json(self) -> dict[str, Any]:
        """The same as JSON has it, with the number of each finding."""
        values = asdict(self)
        for finding, one in zip(values["findings"], self.findings, strict=True):
            finding["count"] = one.count
        if self.doubts is not None:
            values["doubts"]["count"] = self.doubts.count
            values["doubts"]["remarks"] = self.doubts.remarks
        return values


def inspect_datasets(datasets: Mapping[str, TokenizedDataset], settings: Settings) -> list[DatasetReport]:
    """A report of each.

    Args:
        datasets: by name; the first one is trained on.
        settings: how to look.
    """
    columns = {name: PairColumns(dataset) for name, dataset in datasets.items()}
    training = next(iter(columns.values()))
    return [_report(name, one, None if one is training else training, settings) for name, one in columns.items()]


def _report(name: str, columns: PairColumns, training: PairColumns | None, settings: Settings) -> DatasetReport:
    dataset = columns.dataset
    found_rules = tuple(rules(columns)) if len(columns.example) else ()
    return DatasetReport(
        name=name,
        examples=len(dataset),
        pairs=len(columns.example),
        prompts=len(columns.prompts),
        lengths=dataset.stats(),
        histograms=histograms(columns),
        max_length=suggested_length(columns),
        rules=found_rules,
        findings=tuple(_findings(columns, training, settings)),
        left_out=dataset.bad_rows,
        notes=tuple(describe_notes(dataset.notes, len(dataset))),
        ignored_columns=dataset.ignored_columns,
        remarks=tuple(_remarks(len(columns.example), found_rules)),
    )


def _findings(columns: PairColumns, training: PairColumns | None, settings: Settings) -> list[Finding]:
    found = [findings.shared_prompts(columns, training)] if training is not None else []
    if training is not None and settings.finds_near:
        found.append(findings.nearly_shared_prompts(columns, training, settings.near, training.common))
    if not len(columns.example):
        return found
    repeated = findings.repeated(columns)
    found += [repeated, findings.contradicting(columns), findings.alike(columns, settings.near)]
    if settings.finds_near:
        same = {one.example for one in repeated.occurrences}
        found += [
            findings.near_pairs(columns, settings.near, same),
            findings.near_prompts(columns, settings.near),
            findings.near_completions(columns, settings.near),
        ]
    return found


def _remarks(num_pairs: int, found: tuple[Rule, ...]) -> list[str]:
    if not num_pairs:
        return ["there are no preferences to judge"]
    if num_pairs < FEWEST:
        return [f"there are fewer than {FEWEST} pairs: no share is judged"]
    remarks = []
    for rule in found:
        if rule.right is not None and rule.decides >= FEWEST and max(rule.right, 1 - rule.right) >= _LOPSIDED:
            word = "chosen" if rule.right >= _LOPSIDED else "rejected"
            remarks.append(
                f"{rule.says} is {word} so often that a model may learn this instead of the quality; "
                "rewards/accuracies do not tell the two apart"
            )
    return remarks
