"""The next step's work, made on a second thread while this step runs.

What is made depends on the step's number alone, so it is the same whenever it is made. The thread reaches no phase
(`phases.py`), takes part in no collective and gives the device nothing to do.
"""

import atexit
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

Made = TypeVar("Made")

_NAME = "ahead"
_PATIENCE = 5.0  # seconds that a process which ends waits for the thread, which needs longer only where a disk hangs


class Ahead(Generic[Made]):
    """Makes what steps need, one step ahead and no further.

    Args:
        make: what a global step needs, from its number.
        num_steps: of the run: nothing is made for a step that there is not.
    """

    def __init__(self, make: Callable[[int], Made], num_steps: int) -> None:
        self._make, self._num_steps = make, num_steps
        self._next: tuple[int, Future[Made]] | None = None

    def of(self, step: int) -> Made:
        """What a step needs; it is made here where it was not begun.

        Args:
            step: the one that was begun last, if one was.

        Raises:
            Exception: what `make` raised, also on the other thread: here, where the step would need it.
        """
        begun, self._next = self._next, None
        assert begun is None or begun[0] == step, "steps follow one another"
        return self._make(step) if begun is None else begun[1].result()

    def begin(self, step: int) -> None:
        """Begin to make what a step needs, if that was not done and there is such a step.

        To be called once the device has something to do: who makes it takes the interpreter from who launches kernels.
        """
        if self._next is not None or step >= self._num_steps:
            return
        future: Future[Made] = Future()
        self._next = step, future
        # A daemon: `end_rank` waits for all others, as long as it takes.
        threading.Thread(target=_fill, args=(future, self._make, step), name=_NAME, daemon=True).start()


def _fill(future: Future[Made], make: Callable[[int], Made], step: int) -> None:
    try:
        future.set_result(make(step))
    except BaseException as error:  # raised where the result is asked for
        future.set_exception(error)


@atexit.register
def _wait() -> None:
    """An interpreter that is taken apart under a thread inside of torch or numpy may abort."""
    for thread in threading.enumerate():
        if thread.name == _NAME:
            thread.join(_PATIENCE)
