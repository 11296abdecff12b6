"""Where numbers are written: a file, and trackers that get the same."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Tracker(Protocol):
    """Where the lines of `metrics.jsonl` are sent as well."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record the numbers of one line."""
        ...

    def close(self) -> None:
        """Flush."""
        ...


class MetricsFile:
    """`metrics.jsonl`: every line once, also after a resume. Owned by the first rank."""

    def __init__(self, path: Path, trackers: Sequence[Tracker] = ()) -> None:
        self._path, self._trackers = path, trackers

    def keep_until(self, step: int) -> None:
        """Drop the lines of steps that a resumed run will compute again, and a last line cut short by a kill."""
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except json.JSONDecodeError:
                break
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(self._path)

    def evaluations(self, step: int) -> dict[str, dict[str, float]]:
        """The numbers of the held-out sets that were evaluated after update `step`, by name."""
        if not self._path.exists():
            return {}
        lines = map(json.loads, self._path.read_text(encoding="utf-8").splitlines())
        of_sets = [line for line in lines if line["step"] == step and line.get("split") == "evaluation"]
        return {line["dataset"]: _numbers(line) for line in of_sets}

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line and send its numbers to the trackers; evaluation keys get the prefix `eval_` there."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        numbers = _numbers(line)
        if line.get("split") == "evaluation":
            numbers = {f"eval_{line['dataset']}_{key}": value for key, value in numbers.items()}
        for tracker in self._trackers:
            tracker.log(numbers, int(line["step"]))

    def close(self) -> None:
        """Flush the trackers."""
        for tracker in self._trackers:
            tracker.close()


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in line.items() if isinstance(value, int | float) and key != "step"}


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

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        import wandb  # noqa: PLC0415  (optional package)

        self._run = wandb.init(dir=str(folder), name=folder.name, config=dict(config))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record one line."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class MlflowTracker:
    """MLflow; needs the extra `mlflow`. The server is what MLFLOW_TRACKING_URI says."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        import mlflow  # noqa: PLC0415  (optional package)

        self._mlflow = mlflow
        mlflow.start_run(run_name=folder.name)
        mlflow.log_dict(dict(config), "config.json")

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record one line."""
        self._mlflow.log_metrics({name.replace("/", "."): value for name, value in values.items()}, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._mlflow.end_run()


# Made from the run's folder, its configuration, and the first step of this start.
TRACKERS: dict[str, Callable[[Path, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": lambda folder, config, first_step: TensorBoardTracker(folder / "tensorboard", first_step),
    "wandb": lambda folder, config, first_step: WandbTracker(folder, config),
    "mlflow": lambda folder, config, first_step: MlflowTracker(folder, config),
}
TRACKER_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
