"""Runs, one after another in one process group, some of them killed or stopped on the way.

    python -m tests.invariance.resume_worker ACTIONS.json          (or under torchrun)

ACTIONS.json is a list of `Action`. Each goes through the CLI's own run function. Afterwards `NAME.rank0.json` and so
on, beside ACTIONS.json, say what happened (`Outcome`), and `NAME.metrics.jsonl` is the run's file as it was then.
"""

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.launching import end_rank


@dataclass(frozen=True)
class Action:
    """One start of a run."""

    name: str
    config: str  # path of a YAML file
    overrides: tuple[str, ...] = ()
    kill_at: int | None = None  # SIGKILL before this step, counted from 0, on every rank
    stop_at: int | None = None  # SIGTERM during this step ...
    stop_rank: int = 0  # ... on this rank alone


@dataclass
class Outcome:
    """What a start of a run did on one rank."""

    steps: list[tuple[int, list[int]]] = field(default_factory=list)  # trained steps, and rows of the whole step
    error: str | None = None
    message: str = ""
    exit_code: int = 0


@contextmanager
def observed(action: Action, rank: int) -> Iterator[Outcome]:
    """Note every step the training loop takes up; send the action's signals there."""
    from dpo_dist import trainer
    from dpo_dist.ahead import Ahead
    from dpo_dist.phases import arm

    outcome = Outcome()

    class Noting(Ahead[Any]):
        def of(self, step: int) -> Any:
            plan, work = super().of(step)
            outcome.steps.append((plan.step, list(plan.examples)))
            return plan, work

    kill = [] if action.kill_at is None else [f"kill@*:{action.kill_at + 1}:step"]
    stop = [] if action.stop_at is None else [f"term@{action.stop_rank}:{action.stop_at + 1}:step"]
    arm(",".join(kill + stop), rank)
    trainer.Ahead = Noting
    try:
        yield outcome
    finally:
        arm("", rank)
        trainer.Ahead = Ahead


def perform(action: Action, results: Path, rank: int) -> Outcome:
    """Start a run and write down what became of it."""
    from dpo_dist.cli.training import run_training
    from dpo_dist.config import load_config
    from dpo_dist.errors import DpoDistError

    config = load_config(action.config, action.overrides)
    with observed(action, rank) as outcome:
        try:
            run_training(config, results / "cache")
        except DpoDistError as error:
            outcome.error, outcome.message, outcome.exit_code = type(error).__name__, str(error), error.exit_code
    (results / f"{action.name}.rank{rank}.json").write_text(json.dumps(asdict(outcome)))
    metrics = Path(config.train.output_dir) / "metrics.jsonl"
    if rank == 0 and metrics.exists():
        shutil.copy(metrics, results / f"{action.name}.metrics.jsonl")
    return outcome


def main() -> None:
    """Perform the actions in order."""
    from dpo_dist.cli.logs import set_up_logging
    from dpo_dist.distributed import process_group

    actions = Path(sys.argv[1])
    set_up_logging()
    with process_group() as ranks:
        for values in json.loads(actions.read_text()):
            perform(Action(**values), actions.parent, ranks.rank)


if __name__ == "__main__":
    main()
    end_rank()
