"""What is wrong with preference data, in full; and the same data without it.

    columns.py   the pairs of a data set as numbers
    findings.py  what is wrong                     which rows, and which others they are held against
    doubts.py    labels that a model contradicts   ranked, by log-probabilities that others compute
    lengths.py   lengths and simple rules          histograms, a suggestion, how often a rule is right
    report.py    all of a data set                 as numbers and texts
    cleaning.py  which rows are left out, and why  a file of rows, and one of reasons
    output.py    the files that are asked for      written whole, and over nothing
    page.py      a report                          HTML
    histogram.py numbers                           SVG

Reads tokenised data and loads no model: `doubts.py` is given what one has said. Near duplicates need the optional
package of `near.py`.
"""

from dpo_dist.inspection.columns import PairColumns
from dpo_dist.inspection.findings import Finding, Occurrence
from dpo_dist.inspection.report import DatasetReport, Settings, inspect_datasets

__all__ = ["DatasetReport", "Finding", "Occurrence", "PairColumns", "Settings", "inspect_datasets"]
