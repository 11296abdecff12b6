"""Rows tokenised by several processes, in the order of the rows, as one process would do it.

Workers are fresh interpreters: a fork would copy the threads' locks of whatever this process has loaded. Each has a
connection of its own. Only so many groups of rows are under way that no worker waits: memory does not grow with the
number of rows. Few rows are done here, and so are those that come while the workers start.
"""

import pickle
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait

from dpo_dist.control_groups import usable_cores
from dpo_dist.errors import DataError, WorkerLostError
from dpo_dist.tokenization.row_encoder import EncodedRows, RawRow, RowEncoder
from dpo_dist.tokenization.worker import Work

ROWS_PER_GROUP = 256
# Fewer rows are done before the workers would be ready.
ROWS_ALONE = 2048
MOST_BY_DEFAULT = 8
_PER_WORKER = 2  # groups: one that it computes, one that waits for it
# A worker is no rank of the job. It loads what this process has just loaded: the same revision, without asking the hub.
_ENVIRONMENT = (
    *(f"-u{name}" for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK")),
    *("OMP_NUM_THREADS=1", "TOKENIZERS_PARALLELISM=false", "HF_HUB_OFFLINE=1", "TRANSFORMERS_VERBOSITY=error"),
)
# transformers imports torch where it finds it, for more than half of a worker's start; a tokenizer has no use for it.
_START = """
import sys
from multiprocessing.connection import Connection
connection = Connection(int(sys.argv[1]))
sys.path[:], hide_torch = connection.recv()
if hide_torch:
    sys.modules["torch"] = None
from dpo_dist.tokenization.worker import serve
serve(connection)
"""
_ASKED_TO_END = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class RowProcesses:
    """Encodes rows here, and in workers once there are many; `close` ends them.

    Args:
        encoder: encodes rows in this process.
        work: the same for a worker.
        digest: of the tokenizer that this process has loaded.
    """

    def __init__(self, encoder: RowEncoder, work: Work, digest: str | None) -> None:
        self._encoder, self._work, self._digest = encoder, work, digest
        # Token ids are only copied; and this process writes what the others make, so that many would wait for it.
        by_default = 1 if work.tokenizer is None else min(usable_cores(), MOST_BY_DEFAULT)
        self._num_proc = work.data.num_proc or by_default
        self._num_alone = 0
        self._workers: list[_Worker] = []

    def encoded(self, rows: Iterable[RawRow]) -> Iterator[EncodedRows]:
        """What all rows become, some at a time, in their order.

        Raises:
            WorkerLostError: a worker was ended by somebody else.
            Exception: as of `rows` and `RowEncoder.encode`, after all that stands before it was given out.
        """
        groups = _grouped(rows)
        for group in groups:
            if self._num_alone >= ROWS_ALONE and self._num_proc > 1 and not self._workers:
                self._start()
            if self._workers and self._is_ready():
                yield from self._encoded_elsewhere(chain([group], groups))
                return
            self._num_alone += len(group)
            yield self._encoder.encode(group)

    def close(self) -> None:
        """End the workers: nothing of theirs is lost."""
        for worker in self._workers:
            worker.process.kill()
            worker.process.wait()
            worker.connection.close()
        self._workers.clear()

    def _encoded_elsewhere(self, groups: Iterator[list[RawRow]]) -> Iterator[EncodedRows]:
        upcoming, done = _with_fault(groups), dict[int, EncodedRows | Exception]()
        number_sent = number_next = 0
        most = (_PER_WORKER + 1) * len(self._workers)
        while True:
            while number_sent - number_next < most and (free := self._free()) is not None:
                group = next(upcoming, None)
                if group is None:
                    break
                self._hand_out(free, number_sent, group, done)
                number_sent += 1
            if number_next == number_sent:
                return
            while number_next not in done:
                self._receive(done)
            outcome = done.pop(number_next)
            number_next += 1
            if isinstance(outcome, Exception):
                raise outcome
            yield outcome

    def _hand_out(
        self,
        worker: "_Worker",
        number: int,
        group: Sequence[RawRow] | Exception,
        done: dict[int, EncodedRows | Exception],
    ) -> None:
        if isinstance(group, Exception):
            done[number] = group
            return
        try:
            message = pickle.dumps((number, group))
        except Exception:  # a column that nobody reads may hold anything
            done[number] = self._encoder.outcome(group)
            return
        worker.num_groups += 1
        try:
            worker.connection.send_bytes(message)
        except OSError:
            raise self._lost(worker) from None

    def _receive(self, done: dict[int, EncodedRows | Exception]) -> None:
        """Wait for an answer of any worker."""
        self._take([worker.connection for worker in self._workers], None, done)

    def _is_ready(self) -> bool:
        """Whether a worker takes rows, without waiting for it."""
        self._take([worker.connection for worker in self._workers], 0.0, {})
        return self._free() is not None

    def _take(
        self, connections: list[Connection], timeout_s: float | None, done: dict[int, EncodedRows | Exception]
    ) -> None:
        answering = wait(connections, timeout_s)
        for worker in self._workers:
            if worker.connection not in answering:
                continue
            try:
                number, outcome = worker.connection.recv()
            except (EOFError, OSError):
                raise self._lost(worker) from None
            if isinstance(outcome, MemoryError):
                raise self._lost(worker)
            if number >= 0:
                worker.num_groups -= 1
                done[number] = outcome
            elif isinstance(outcome, Exception):
                raise outcome
            elif outcome != self._digest:
                raise DataError(
                    f"{self._work.tokenizer_name} changed while data were tokenised; wait until it is complete, and "
                    "start again"
                )
            else:
                worker.is_ready = True

    def _free(self) -> "_Worker | None":
        """The worker with the fewest groups, if it has not enough of them."""
        ready = [one for one in self._workers if one.is_ready and one.num_groups < _PER_WORKER]
        return min(ready, key=lambda one: one.num_groups, default=None)

    def _start(self) -> None:
        # Code of the tokenizer's own may need torch.
        hide_torch = self._work.tokenizer is None or not self._work.tokenizer.trust_remote_code
        for _ in range(self._num_proc):
            here, there = Pipe()
            # A worker keeps the signals blocked: this process is asked to end, and ends it.
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _ASKED_TO_END)
            try:
                command = ["env", *_ENVIRONMENT, sys.executable, "-c", _START, str(there.fileno())]
                process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[there.fileno()])
                self._workers.append(_Worker(process, here))
            except OSError as error:
                here.close()
                raise WorkerLostError(
                    f"data.num_proc={self._num_proc}: a process cannot be started ({error.strerror or error}); set "
                    "data.num_proc=1"
                ) from error
            finally:
                there.close()
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            with suppress(OSError):  # a worker that is gone is found when it should answer
                here.send((sys.path, hide_torch))
                here.send(self._work)

    def _lost(self, worker: "_Worker") -> WorkerLostError:
        try:
            code = worker.process.wait(timeout=10)
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        except subprocess.TimeoutExpired:
            how = "has no memory left"
        return WorkerLostError(
            f"data.num_proc={self._num_proc}: a process that tokenises {how}, most likely because memory ran out; "
            f"set data.num_proc={max(1, self._num_proc // 2)}, or give the job more memory"
        )


@dataclass(eq=False)
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection
    is_ready: bool = False
    num_groups: int = 0  # that it has not answered


def _grouped(rows: Iterable[RawRow]) -> Iterator[list[RawRow]]:
    iterator = iter(rows)
    while group := list(islice(iterator, ROWS_PER_GROUP)):
        yield group


def _with_fault(groups: Iterator[list[RawRow]]) -> Iterator[list[RawRow] | Exception]:
    """The groups, and at the end what hides further ones: what is wrong with earlier rows is told before."""
    try:
        yield from groups
    except Exception as error:
        yield error
