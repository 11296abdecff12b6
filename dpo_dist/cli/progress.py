"""What a user sees while training: a progress bar on a terminal, one line per interval in a log, never both."""

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)

Report = Callable[[Mapping[str, Any]], None]


@contextmanager
def reporting(num_steps: int, first_step: int, visible: bool) -> Iterator[Report]:
    """A function that shows a written line; a bar where standard error is a terminal.

    Args:
        num_steps: of the whole run.
        first_step: updates completed before this start.
        visible: False on all ranks but the first.
    """
    if not visible:
        yield lambda line: None
    elif not sys.stderr.isatty():
        yield lambda line: logger.info("%s", as_text(line, num_steps))
    else:
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("", total=num_steps, completed=first_step)

            def show(line: Mapping[str, Any]) -> None:
                if "split" in line:
                    bar.console.print(as_text(line, num_steps))
                else:
                    bar.update(task, completed=line["step"], description=_numbers(line))

            yield show


def as_text(line: Mapping[str, Any], num_steps: int) -> str:
    """A written line as one line of a log."""
    what = f"held-out {line['dataset']}: " if line.get("split") == "evaluation" else ""
    rate = f"  {line['tokens_per_second']:.0f} tokens/s" if "tokens_per_second" in line else ""
    return f"step {line['step']}/{num_steps}  {what}{_numbers(line)}{rate}"


# What is shown of a line, where it has it: a supervised run has no rewards.
_SHOWN = {
    "loss": ".4f",
    "rewards/margins": "+.4f",
    "rewards/accuracies": ".2f",
    "mean_token_accuracy": ".3f",
}


def _numbers(line: Mapping[str, Any]) -> str:
    names = [name for name in _SHOWN if name in line]
    if "rewards/margins" in names:
        names = [name for name in names if name != "mean_token_accuracy"]
    left_out = [f"left out: {line['skipped_steps']}"] if "skipped_steps" in line else []
    return "  ".join([f"{name} {line[name]:{_SHOWN[name]}}" for name in names] + left_out)
