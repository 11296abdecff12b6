"""What a user sees while data are tokenised: a bar on a terminal, a line now and then in a log, never both."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dpo_dist.data import Source

_LOG_EVERY_S = 10.0
_BAR_EVERY_S = 0.1
_LOGGER = logging.getLogger(__name__)

Tell = Callable[[int, int], None]


@contextmanager
def telling(source: Source, rows_before: int = 0) -> Iterator[Tell]:
    """A function that is called as often as there is something new, with the rows read and the tokens written.

    Only the process that tokenises calls it, so that one bar is shown, whichever rank that is.

    Args:
        source: that is read.
        rows_before: rows that an earlier process has tokenised; in no rate.
    """
    if not sys.stderr.isatty():

        def say(rows: int, tokens: int, rate: float) -> None:
            _LOGGER.info("%s", _line(source, rows, tokens, rate))

        yield _every(_LOG_EVERY_S, rows_before, say)
        return
    # Workers import this file too, and show nothing.
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: PLC0415

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(source.key, total=None)

        def show(rows: int, tokens: int, rate: float) -> None:
            share = source.meter.share
            total = None if share is None else 1.0
            bar.update(task, total=total, completed=share or 0, description=_line(source, rows, tokens, rate))

        yield _every(_BAR_EVERY_S, rows_before, show)


def _line(source: Source, rows: int, tokens: int, rate: float) -> str:
    share = source.meter.share
    known = "" if share is None else f", {share:.0%}"
    return f"{source.key}: {rows:,} rows read{known}, {rate:,.0f} rows/s, {tokens:,} tokens"


def _every(interval_s: float, rows_before: int, show: Callable[[int, int, float], None]) -> Tell:
    start_s = time.monotonic()
    next_s = start_s + interval_s

    def tell(rows: int, tokens: int) -> None:
        nonlocal next_s
        now_s = time.monotonic()
        if now_s >= next_s:
            next_s = now_s + interval_s
            show(rows, tokens, (rows - rows_before) / max(now_s - start_s, 1e-9))

    return tell
