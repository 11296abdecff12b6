"""Implicit rewards of a step, and where numbers are written.

Names and meanings are TRL's: `rewards/*` = beta * log-ratio summed over completion tokens, for every loss; a tie
counts as wrong; `logps/*` are sums over a completion. Everything is summed over pairs on the device, added up over
micro-batches and ranks once per step, and divided once when a line is written: never a mean of means.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from dpo_dist.batch import MicroBatch
from dpo_dist.errors import NumericsError

# What a step adds up. The first two belong to the loss of pairs, the next seven are per pair, two are counts of tokens,
# and the last two belong to the loss of tokens.
SUMS = (
    "loss",
    "pair_weight",
    "num_pairs",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "tokens_processed",
    "tokens_unshared",
    "token_loss",
    "token_weight",
)
PER_PAIR = SUMS[3:9]
COUNTS = ("tokens_processed", "tokens_unshared", "tokens_padded")

# Keys that depend on the clock or the machine; all other keys are reproducible bit for bit.
WALL_CLOCK = ("pairs_per_second", "tokens_per_second", "time/step", "memory/peak_gib")


def step_sums(
    batch: MicroBatch,
    logps_C: Float[Tensor, " C"],
    logratios_C: Float[Tensor, " C"],
    losses_U: Float[Tensor, " U"],
    beta: float,
) -> Float[Tensor, " K"]:
    """The sums of one micro-batch in the order of `SUMS`, float64, on the batch's device; no host synchronisation."""
    with torch.no_grad():
        chosen_B, rejected_B = batch.pair_chosen_B, batch.pair_rejected_B
        rewards_C = beta * logratios_C.double()
        margins_B = rewards_C[chosen_B] - rewards_C[rejected_B]
        per_pair_KB = torch.stack(
            [
                torch.ones_like(margins_B),
                rewards_C[chosen_B],
                rewards_C[rejected_B],
                margins_B,
                (margins_B > 0).double(),
                logps_C.double()[chosen_B],
                logps_C.double()[rejected_B],
            ]
        )
        tokens = torch.tensor([batch.num_tokens, batch.num_unshared_tokens], dtype=torch.float64)
        of_pairs, of_tokens = losses_U.double().unbind()
        weights = (
            batch.pair_weight_B.double().sum(),
            (batch.chosen_weight_C.double() * batch.completion_length_C).sum(),
        )
        return torch.cat(
            [
                torch.stack([of_pairs, weights[0]]),
                per_pair_KB.sum(1),
                tokens.to(margins_B.device),
                torch.stack([of_tokens, weights[1]]),
            ]
        )


def loss_of(sums: Mapping[str, float]) -> float:
    """The loss of whatever was added up: of pairs per weight of pairs, and of tokens per weight of tokens."""
    # A window that an earlier version saved knows of pairs only.
    of_tokens = sums.get("token_loss", 0.0) / (sums.get("token_weight", 0.0) or 1.0)
    return sums["loss"] / sums["pair_weight"] + of_tokens


class Window:
    """Sums over the steps since the last written line."""

    def __init__(self, sums: Mapping[str, float] | None = None, num_steps: int = 0) -> None:
        self.sums: dict[str, float] = dict(sums or {})
        self.num_steps = num_steps

    def add(self, step_values: Mapping[str, float]) -> None:
        """Add the sums of one step."""
        self.num_steps += 1
        for name, value in step_values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps of an interval that is not over; JSON keeps every bit of a float."""
        return {"num_steps": self.num_steps, "sums": self.sums}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Window":
        """What `to_json` gave."""
        return cls(values["sums"], values["num_steps"])

    def means(self) -> dict[str, float]:
        """Loss per unit of weight, everything else per pair."""
        pairs = self.sums["num_pairs"]
        return {"loss": loss_of(self.sums), **{name: self.sums[name] / pairs for name in PER_PAIR}}

    def counts(self) -> dict[str, int]:
        """Token counts of the interval."""
        return {name: int(self.sums[name]) for name in COUNTS if name in self.sums}


def padded_tokens(pair_lengths: Sequence[int], rows_per_batch: int = 8) -> int:
    """Tokens TRL's layout would run: per 8 consecutive pairs 16 rows, each as long as the longest row among them.

    Args:
        pair_lengths: for every pair, prompt plus its longer completion, in the sampler's order.
        rows_per_batch: pairs in one of TRL's batches (its default per-device batch size).
    """
    batches = [pair_lengths[i : i + rows_per_batch] for i in range(0, len(pair_lengths), rows_per_batch)]
    return sum(2 * len(batch) * max(batch) for batch in batches)


def require_finite(step: int, values: Mapping[str, float]) -> None:
    """Stop where a number has become NaN or infinite.

    Raises:
        NumericsError: naming the step and the values.
    """
    broken = {name: value for name, value in values.items() if not math.isfinite(value)}
    if broken:
        listed = ", ".join(f"{name}={value}" for name, value in broken.items())
        raise NumericsError(
            f"step {step}: {listed}; checkpoints written before are intact. "
            "Lower train.learning_rate, or use model.dtype=bfloat16 or float32"
        )


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

    def has_evaluation(self, step: int) -> bool:
        """Whether the held-out sets were evaluated after update `step`."""
        if not self._path.exists():
            return False
        lines = map(json.loads, self._path.read_text(encoding="utf-8").splitlines())
        return any(line["step"] == step and line.get("split") == "evaluation" for line in lines)

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line and send its numbers to the trackers; evaluation keys get the prefix `eval_` there."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        numbers = {key: float(value) for key, value in line.items() if isinstance(value, int | float) and key != "step"}
        if line.get("split") == "evaluation":
            numbers = {f"eval_{line['dataset']}_{key}": value for key, value in numbers.items()}
        for tracker in self._trackers:
            tracker.log(numbers, int(line["step"]))

    def close(self) -> None:
        """Flush the trackers."""
        for tracker in self._trackers:
            tracker.close()


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
