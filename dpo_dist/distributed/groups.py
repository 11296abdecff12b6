"""Who the ranks are, and their process group.

Together with `meeting` and `cli` the only place that reads environment variables.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from dpo_dist.distributed.collectives import barrier
from dpo_dist.distributed.meeting import is_announced, loopback_store, meeting, require_announced

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LATER = timedelta(seconds=60)


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
    use_cuda, waits = torch.cuda.is_available(), timeout
    backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
    if is_announced():
        require_announced()
    if use_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        # The watch speaks first: NCCL ends a process without a word.
        timeout += _LATER
    _keep_to_loopback()
    if is_announced():
        with meeting(waits):
            _meet(backend, timeout)
        return
    # DeepSpeed asks the environment who it is; a single process started by hand has to say so itself.
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)


def _meet(backend: str, timeout: timedelta) -> None:
    if _on_one_machine() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        rank, world_size = launched_rank(), int(os.environ["WORLD_SIZE"])
        store = loopback_store(timeout, rank, world_size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout)


def _keep_to_loopback() -> None:
    """Ranks of one machine talk over its loopback interface, unless the user names another one.

    gloo listens where the machine's name leads to, which others may reach, and asks nobody who they are.
    """
    if _on_one_machine() and os.path.exists("/sys/class/net/lo"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def _ranks_per_node() -> int:
    # The second name is that of DeepSpeed's launcher.
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE", "1"))


def _on_one_machine() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) == _ranks_per_node()


def _ranks() -> Ranks:
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    return Ranks(dist.get_rank(), dist.get_world_size(), local_rank, device, _ranks_per_node())


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
