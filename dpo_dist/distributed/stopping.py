"""A request to stop, and how all ranks hear of it."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from torch import Tensor

from dpo_dist.distributed.collectives import sum_over_ranks

logger = logging.getLogger(__name__)


class Stopped(Exception):  # noqa: N818  (no error: what was asked for)
    """A run was asked to stop where there is nothing to save."""


class StopRequest:
    """Whether this process was asked to stop (SIGTERM, SIGINT, SIGUSR1); all ranks agree on it at a step's end.

    A first signal only sets a flag, so that the step and a checkpoint are completed; a second interrupt is Python's.
    """

    def __init__(self) -> None:
        self.requested = False

    def as_tensor(self, device: torch.device) -> Tensor:
        """1 if a signal has come, else 0; shape (1,), float64."""
        return torch.tensor([float(self.requested)], dtype=torch.float64, device=device)

    def obey(self) -> None:
        """Leave, on every rank, if any rank was asked to stop. Collective.

        Raises:
            Stopped: on every rank.
        """
        if float(sum_over_ranks(self.as_tensor(torch.device("cpu")))) > 0:
            raise Stopped

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Take the signals over while inside; a signal can only be taken over by the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        former = {number: signal.signal(number, self._on_signal) for number in signals}
        try:
            yield self
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        logger.warning(
            "%s: stopping after this step, with a checkpoint if every rank still runs", signal.Signals(number).name
        )
