"""`dpo-dist compare`: what runs differ in, and what came of it, in one table. Reads their folders, and no model."""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from dpo_dist.errors import ConfigError

DEFAULT_METRICS = ("loss", "rewards/accuracies", "rewards/margins")
_CONFIG, _METRICS, _RECORD = "config.yaml", "metrics.jsonl", "model/dpo_dist.json"
# Where a run writes, and how it goes on: its own affair.
_OWN = ("train.output_dir", "checkpoint.", "log.", "parallel.ddp_timeout")


@dataclass(frozen=True)
class Outcome:
    """One run as its folder tells."""

    name: str
    settings: Mapping[str, Any]
    """By `section.key`, without what is the run's own affair."""
    state: str
    """`finished`, or how far it got."""
    step: int
    """Of the values."""
    values: Mapping[str, float]
    """Of the held-out set, or of training where there is none."""


def outcomes(folders: Sequence[Path], dataset: str | None) -> list[Outcome]:
    """Every run in these folders, or in the folders directly in them.

    Args:
        folders: of runs, or of sweeps.
        dataset: the held-out set whose values are shown; None: the first one, or training where there is none.
    Raises:
        ConfigError: a folder holds no run, or a run has no such set.
    """
    runs = [run for folder in folders for run in _runs_in(folder)]
    names = _short_names(runs)
    return [_outcome(run, name, dataset) for run, name in zip(runs, names, strict=True)]


def differing(found: Sequence[Outcome]) -> list[str]:
    """Settings that are not the same in all runs."""
    keys = sorted({key for one in found for key in one.settings})
    return [key for key in keys if len({json.dumps(one.settings.get(key)) for one in found}) > 1]


def ranked(found: Sequence[Outcome], metric: str) -> list[Outcome]:
    """The best first: the smallest loss, the largest of anything else. Runs without a value come last."""
    sign = 1.0 if metric.endswith("loss") else -1.0
    return sorted(found, key=lambda one: (metric not in one.values, sign * one.values.get(metric, 0.0), one.name))


def table_of(found: Sequence[Outcome], metrics: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Column names, and a row of texts for each run."""
    keys = differing(found)
    rows = [
        [
            one.name,
            *(_text(one.settings.get(key)) for key in keys),
            one.state,
            str(one.step),
            *(f"{one.values[metric]:.4f}" if metric in one.values else "" for metric in metrics),
        ]
        for one in found
    ]
    return ["run", *keys, "state", "step", *metrics], rows


def compare(folders: Sequence[Path], metrics: Sequence[str], by: str | None, dataset: str | None, form: str) -> str:
    """The report.

    Args:
        folders: of runs, or of sweeps.
        metrics: which to show; none: DEFAULT_METRICS.
        by: the metric that runs are sorted by; None: the first one shown.
        dataset: as in `outcomes`.
        form: `table`, `csv` or `json`.
    Raises:
        ConfigError: as `outcomes`; or no run has such a metric.
    """
    found, metrics = outcomes(folders, dataset), list(metrics or DEFAULT_METRICS)
    known = sorted({metric for one in found for metric in one.values})
    for option, metric in (*(("metric", one) for one in metrics), ("by", by or metrics[0])):
        if metric not in known and metric not in DEFAULT_METRICS:
            raise ConfigError(f"--{option}={metric} is in no run; there are {', '.join(known)}")
    found = ranked(found, by or metrics[0])
    if form == "json":
        keys = differing(found)
        return json.dumps([_as_json(one, keys) for one in found], indent=1)
    columns, rows = table_of(found, metrics)
    return _csv(columns, rows) if form == "csv" else _table(columns, rows)


def _runs_in(folder: Path) -> list[Path]:
    if (folder / _CONFIG).is_file():
        return [folder]
    below = sorted(path.parent for path in folder.glob(f"*/{_CONFIG}"))
    if not below:
        raise ConfigError(f"{folder} holds no run (no {_CONFIG}), nor do the folders in it; name a train.output_dir")
    return below


def _short_names(runs: Sequence[Path]) -> list[str]:
    """The last part of each path, or more of it where that is not enough to tell them apart."""
    return [run.name if sum(run.name == other.name for other in runs) == 1 else str(run) for run in runs]


def _outcome(run: Path, name: str, dataset: str | None) -> Outcome:
    config = _read_config(run)
    lines = list(_lines(run / _METRICS))
    sets = list(dict.fromkeys(line["dataset"] for line in lines if line.get("split") == "evaluation"))
    if dataset is not None and dataset not in sets:
        raise ConfigError(f"--dataset={dataset} was not evaluated in {run}; there are {', '.join(sets) or 'none'}")
    chosen = dataset or (sets[0] if sets else None)
    wanted = [line for line in lines if line.get("dataset") == chosen and line.get("split") != "self_check"]
    record = _record(run)
    line = _line_at(wanted, record)
    last = max((line["step"] for line in lines), default=0)
    state = "finished" if record is not None else f"at step {last}"
    values = {key: float(value) for key, value in line.items() if key != "step" and isinstance(value, int | float)}
    return Outcome(name, _settings(config), state, int(line.get("step", 0)), values)


def _line_at(lines: Sequence[Mapping[str, Any]], step: int | None) -> Mapping[str, Any]:
    """The line of the exported model's step, which may be an earlier one (load_best_model_at_end); else the last."""
    exact = [line for line in lines if line["step"] == step]
    return exact[-1] if exact else lines[-1] if lines else {}


def _read_config(run: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load((run / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{run / _CONFIG} cannot be read ({error})") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{run / _CONFIG} is not the configuration of a run; leave this folder out")
    return config


def _lines(path: Path) -> Iterable[dict[str, Any]]:
    """Lines of the metrics; one that is cut short, as of a run that is writing, is left out."""
    if not path.is_file():
        return
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            yield line


def _record(run: Path) -> int | None:
    try:
        return int(json.loads((run / _RECORD).read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    flat = {
        f"{section}.{key}": value
        for section, keys in config.items()
        if isinstance(keys, dict)
        for key, value in keys.items()
    }
    return {key: value for key, value in flat.items() if not key.startswith(_OWN)}


def _text(value: object) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _as_json(one: Outcome, keys: Sequence[str]) -> dict[str, Any]:
    settings = {key: one.settings.get(key) for key in keys}
    return {"run": one.name, "settings": settings, "state": one.state, "step": one.step, "values": dict(one.values)}


def _csv(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue().rstrip()


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    table = Table()
    for column in columns:
        table.add_column(column, justify="left" if column in ("run", "state") else "right")
    for row in rows:
        table.add_row(*row)
    # Wide enough for all: what follows a pipe or a log cannot be scrolled.
    console = Console(width=400, file=io.StringIO(), highlight=False, markup=False)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())
