"""How ranks find each other: what a launcher has announced, the store where they meet, and why they did not.

Together with `groups` and `cli` the only place that reads environment variables.
"""

import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dpo_dist.errors import ConfigError, PeerLostError

_LOOPBACK = "127.0.0.1"
# With what stands for one that is not set: without LOCAL_RANK, each machine has one process.
_NUMBERS = {"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": "0", "MASTER_PORT": ""}


def is_announced() -> bool:
    """Whether a launcher has started this process."""
    return "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ


def require_announced(environment: Mapping[str, str] | None = None) -> None:
    """What the launcher has set must hold together, before anybody waits for ranks that cannot come.

    Args:
        environment: of this process, which is the default.
    Raises:
        ConfigError: naming the variable.
    """
    environment = os.environ if environment is None else environment
    values = {name: environment.get(name, default) for name, default in _NUMBERS.items()}
    for name, value in values.items():
        if not value.isdecimal():
            raise ConfigError(
                f"{name}={value or '(not set)'} is not a number, and WORLD_SIZE={values['WORLD_SIZE']} says that a "
                "launcher started this process; start with torchrun, deepspeed or srun as docs/launching.md shows, or "
                "unset WORLD_SIZE and MASTER_ADDR for a single process"
            )
    rank, world_size, local_rank, port = (int(values[name]) for name in _NUMBERS)
    if not 0 < port < 65536:
        raise ConfigError(f"MASTER_PORT={port} is no port; choose one between 1024 and 65535")
    if rank >= world_size:
        raise ConfigError(
            f"RANK={rank} with WORLD_SIZE={world_size}: ranks count from 0 to {world_size - 1}; set WORLD_SIZE to the "
            "number of all processes on all machines"
        )
    if torch.cuda.is_available() and local_rank >= (count := torch.cuda.device_count()):
        raise ConfigError(
            f"LOCAL_RANK={local_rank}, and this process sees {count} GPUs; start one process for each "
            "(--nproc-per-node, --gpus), or correct CUDA_VISIBLE_DEVICES"
        )


@contextmanager
def meeting(timeout: timedelta) -> Iterator[None]:
    """Inside, this process waits for the others; if they do not meet, it says where, and what to look at.

    Args:
        timeout: how long it waits, `parallel.ddp_timeout`.
    Raises:
        PeerLostError: they have not come.
        ConfigError: the port is another program's, or there is no such interface.
    """
    try:
        yield
    except dist.DistError as error:
        raise _unmet(str(error).strip(), timeout) from error
    except RuntimeError as error:
        if "Unable to find address for" not in str(error):  # gloo's words
            raise
        raise ConfigError(
            f"GLOO_SOCKET_IFNAME={os.environ.get('GLOO_SOCKET_IFNAME')} names no interface of this machine; dpo-dist "
            "doctor lists them (FABRIC_INTERFACE sets it in launch/)"
        ) from error


def _unmet(text: str, timeout: timedelta) -> Exception:
    place = f"MASTER_ADDR={os.environ['MASTER_ADDR']}, MASTER_PORT={os.environ['MASTER_PORT']}"
    rank, world_size = os.environ["RANK"], os.environ["WORLD_SIZE"]
    within = f"within parallel.ddp_timeout={timeout.total_seconds():.0f} s"
    if "listen" in text and ("EADDRINUSE" in text or "address already in use" in text):
        return _port_taken(os.environ["MASTER_PORT"], "address already in use")
    if counted := re.search(r"(\d+)/\d+ clients joined", text):
        return PeerLostError(
            f"{counted[1]} of WORLD_SIZE={world_size} ranks came to {place} {within}; start all of them with the same "
            "three variables, and see what the others say"
        )
    return PeerLostError(
        f"RANK={rank} did not reach the first rank at {place} {within} ({text.splitlines()[0].rstrip('.')}); it is not "
        "started, or the address is wrong, behind a firewall, or another program's"
    )


def _port_taken(port: str, error: object) -> ConfigError:
    return ConfigError(
        f"MASTER_PORT={port} cannot be listened at ({error}): another run on this machine may use it; give the "
        "launcher another port (--master_port of deepspeed, --head name:port, HEAD=name:port)"
    )


def loopback_store(timeout: timedelta, rank: int, world_size: int) -> Any:
    """What ranks of one machine find each other by, at the port that the launcher picked.

    Left to itself torch listens on all interfaces, whatever address it is given (pytorch#173909).
    """
    port, store = int(os.environ["MASTER_PORT"]), dist.TCPStore  # pyright: ignore[reportPrivateImportUsage]
    if rank:
        return store(_LOOPBACK, port, world_size, is_master=False, timeout=timeout)
    try:
        listening = socket.create_server((_LOOPBACK, port), backlog=1024)
    except OSError as error:
        raise _port_taken(str(port), error) from None
    return store(_LOOPBACK, port, world_size, is_master=True, timeout=timeout, master_listen_fd=listening.detach())
