"""Ranks, process groups, and the few collectives we use.

Nothing here pickles: what travels between ranks is a tensor, or JSON as bytes. Together with `cli` the only place that
reads environment variables.
"""

import ctypes
import hashlib
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dpo_dist import errors
from dpo_dist.errors import DpoDistError, RankMismatchError

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among all processes of the run."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    ranks_per_node: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the one rank that writes files and prints."""
        return self.rank == 0


@contextmanager
def process_group(
    timeout: timedelta = timedelta(minutes=30), release: Callable[[], None] = lambda: None
) -> Iterator[Ranks]:
    """The run's process group: what the launcher announced, or this process alone.

    A group that exists already is used and left as it is, so that many runs can share one (tests, notebooks).

    Args:
        timeout: of a collective.
        release: makes other libraries forget the group before it is destroyed.
    """
    owned = not dist.is_initialized()
    if owned:
        _initialise(timeout)
    try:
        yield _ranks()
        if owned:
            # Ranks that end unevenly abort in gloo now and then: all wait for the slowest before anybody leaves.
            barrier()
    finally:
        if owned:
            release()
            if dist.is_initialized():
                dist.destroy_process_group()


def _initialise(timeout: timedelta) -> None:
    use_cuda = torch.cuda.is_available()
    backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
    if use_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    _keep_to_loopback()
    if "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
        return
    # DeepSpeed asks the environment who it is; a single process started by hand has to say so itself.
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)


def _keep_to_loopback() -> None:
    """Ranks of one machine talk over its loopback interface, unless the user names another one.

    gloo listens where the machine's name leads to, which others may reach, and asks nobody who they are.
    """
    one_machine = os.environ.get("WORLD_SIZE", "1") == os.environ.get("LOCAL_WORLD_SIZE", "1")
    if one_machine and os.path.exists("/sys/class/net/lo"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def _ranks() -> Ranks:
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return Ranks(dist.get_rank(), dist.get_world_size(), local_rank, device, ranks_per_node)


def end_with_launcher() -> None:
    """Ask the system for SIGTERM when torchrun is gone: a rank that outlived it would train on beside its successor.

    Linux alone can do so. A process that torchrun did not start is left alone: its parent may well end before it.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it went before the system was asked
        os.kill(os.getpid(), signal.SIGTERM)


def launched_rank() -> int:
    """The rank the launcher gave this process, before any process group exists; 0 when it was started by hand."""
    return int(os.environ.get("RANK", "0"))


def is_first_of_node() -> bool:
    """Whether the launcher started this process first on its machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


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


def barrier() -> None:
    """Wait until every rank is here; nothing to wait for without a process group."""
    if dist.is_initialized():
        # A CPU all-reduce: dist.barrier() on NCCL picks a device by guessing and can hang.
        dist.all_reduce(torch.zeros(1))


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, as a new CPU tensor in float64; the device-to-host copy of a step."""
    total = values.detach().to("cpu", torch.float64, copy=True)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


def join_over_ranks(parts: Tensor, first_rank_only: bool = False) -> None:
    """Put together, in place, a CPU tensor of which every rank has some elements, and 0 for those of the others.

    Exact in any precision: a value only ever meets zeros.

    Args:
        parts: the same shape on every rank.
        first_rank_only: the others' tensors are undefined afterwards, and less is sent.
    """
    if not dist.is_initialized():
        return
    if first_rank_only:
        dist.reduce(parts, dst=0)
    else:
        dist.all_reduce(parts)


def broadcast_tensor(values: Tensor) -> None:
    """Overwrite a CPU tensor with the first rank's, of the same shape and dtype."""
    if dist.is_initialized():
        dist.broadcast(values, src=0)


def all_gather_json(value: Any) -> list[Any]:
    """Every rank's JSON value, in rank order."""
    if not dist.is_initialized():
        return [value]
    payload = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, torch.tensor([len(payload)]))
    longest = max(int(length) for length in lengths)
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(payload)] = payload
    gathered = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(gathered, padded)
    return [
        json.loads(bytes(row[: int(length)].tolist()).decode()) for row, length in zip(gathered, lengths, strict=True)
    ]


def broadcast_json(value: Any) -> Any:
    """The first rank's JSON value, on every rank."""
    return all_gather_json(value if not dist.is_initialized() or dist.get_rank() == 0 else None)[0]


def raise_together(error: Exception | None) -> None:
    """Raise on every rank if any rank has an error, so that nobody waits for a rank that has gone.

    Raises:
        DpoDistError: the first rank's error in rank order, with its own class if it is one of ours.
    """
    mine = None if error is None else [type(error).__name__, str(error)]
    own_rank = dist.get_rank() if dist.is_initialized() else 0
    try:
        everybody = all_gather_json(mine)
    except RuntimeError:
        if error is None:
            raise
        raise error from None  # the others have gone, perhaps for the same reason: this rank's own tells more
    for rank, theirs in enumerate(everybody):
        if theirs is None:
            continue
        if error is not None and rank == own_rank:
            raise error
        name, message = theirs
        kind = getattr(errors, name, None)
        if isinstance(kind, type) and issubclass(kind, DpoDistError):
            raise kind(message)
        raise RuntimeError(f"rank {rank} failed: {name}: {message}")


@contextmanager
def raising_together() -> Iterator[None]:
    """An error inside is raised on every rank; see `raise_together`."""
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    raise_together(error)


def require_agreement(facts: Mapping[str, str]) -> None:
    """Every rank must hold the same values. Collective.

    Args:
        facts: values by what they are, for people.
    Raises:
        RankMismatchError: on every rank, naming the first fact that differs, with the ranks that differ from the first.
    """
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    if len(set(all_gather_json(digest))) == 1:
        return
    everybody = all_gather_json(dict(facts))
    for what in dict.fromkeys(name for theirs in everybody for name in theirs):
        values = [theirs.get(what, "nothing") for theirs in everybody]
        others = {rank: value for rank, value in enumerate(values) if value != values[0]}
        if others:
            listed = ", ".join(f"rank {rank}: {value}" for rank, value in list(others.items())[:4])
            raise RankMismatchError(
                f"{what} differs between ranks: rank 0: {values[0]}, {listed}; "
                "start every rank with the same configuration, data files, model folders and package versions"
            )
