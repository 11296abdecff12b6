"""Trackers: where the lines of `metrics.jsonl` go as well. A run that is resumed goes on in the tracker's own run."""

import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dpo_dist.metrics.file import Tracker

RUNS_FILE = "trackers.json"  # in the run's folder: by tracker, the name that it has given to this run

_LOGGER = logging.getLogger(__name__)


def _known_run(folder: Path, tracker: str, first_step: int) -> str | None:
    """The tracker's own run to go on with; None at a beginning, or where it is not known."""
    if first_step == 0:
        return None
    return _runs(folder).get(tracker)


def _runs(folder: Path) -> dict[str, str]:
    try:
        values = json.loads((folder / RUNS_FILE).read_text(encoding="utf-8"))
        return {str(name): run for name, run in values.items() if isinstance(run, str)}
    except (OSError, ValueError, AttributeError):  # it decides nothing but which curve goes on
        return {}


def _remember(folder: Path, tracker: str, run: str) -> None:
    """Write the name of the tracker's run down; whatever happens, the file is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    staging = folder / f".{RUNS_FILE}"
    staging.write_text(json.dumps({**_runs(folder), tracker: run}, indent=1) + "\n", encoding="utf-8")
    os.replace(staging, folder / RUNS_FILE)


class TensorBoardTracker:
    """Event files that `tensorboard --logdir` reads."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  (a run that does not report to it needs none)

        # What an earlier start has written from this step on is not shown any more.
        self._writer = SummaryWriter(str(folder), purge_step=first_step)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record one scalar per key."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WandbTracker:
    """Weights & Biases; needs the extra `wandb`. The key comes from the environment or `wandb login`, not from here."""

    def __init__(self, folder: Path, config: Mapping[str, Any], first_step: int) -> None:
        import wandb  # noqa: PLC0415  (optional package)

        # Lines that the former start has written already are dropped by wandb: they are the same.
        known = _known_run(folder, "wandb", first_step)
        goes_on = {"id": known, "resume": "allow"} if known else {}
        self._run = wandb.init(dir=str(folder), name=folder.name, config=dict(config), **goes_on)
        _remember(folder, "wandb", self._run.id)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record one line."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class MlflowTracker:
    """MLflow; needs the extra `mlflow`. The server is what MLFLOW_TRACKING_URI says."""

    def __init__(self, folder: Path, config: Mapping[str, Any], first_step: int) -> None:
        import mlflow  # noqa: PLC0415  (optional package)

        self._mlflow = mlflow
        known = _known_run(folder, "mlflow", first_step)
        run = None if known is None else self._go_on(known)
        if run is None:
            run = mlflow.start_run(run_name=folder.name)
        _remember(folder, "mlflow", run.info.run_id)
        mlflow.log_dict(dict(config), "config.json")

    def _go_on(self, run_id: str) -> Any:
        """That run; None where the server does not have it any more."""
        try:
            return self._mlflow.start_run(run_id=run_id)
        except self._mlflow.MlflowException as error:
            _LOGGER.warning("log.report_to=mlflow: run %s cannot go on (%s); a new one begins", run_id, error)
            return None

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record one line."""
        self._mlflow.log_metrics({name.replace("/", "."): value for name, value in values.items()}, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._mlflow.end_run()


# Made from the run's folder, its configuration, and the first step of this start.
TRACKERS: dict[str, Callable[[Path, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": lambda folder, config, first_step: TensorBoardTracker(folder / "tensorboard", first_step),
    "wandb": lambda folder, config, first_step: WandbTracker(folder, config, first_step),
    "mlflow": lambda folder, config, first_step: MlflowTracker(folder, config, first_step),
}
TRACKER_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
