"""Ranks that do not find each other: each says within its time what it waited for, and which variable to look at."""

import os
import re
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from dpo_dist.distributed import meeting
from dpo_dist.errors import ConfigError, PeerLostError
from dpo_dist.peers import is_peer_lost
from tests.launching import REPOSITORY

TIMEOUT = timedelta(seconds=2)


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        number = str(free.getsockname()[1])
    launched(monkeypatch, MASTER_PORT=number)
    return number


def launched(monkeypatch: pytest.MonkeyPatch, **changes: str) -> None:
    defaults = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in (defaults | changes).items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"RANK": ""}, r"RANK=\(not set\) is not a number, and WORLD_SIZE=2 says that a launcher started this"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT=http is not a number"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two is not a number"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT=99999 is no port; choose one between"),
        ({"RANK": "2"}, r"RANK=2 with WORLD_SIZE=2: ranks count from 0 to 1; set WORLD_SIZE"),
    ],
)
def test_what_a_launcher_says_must_hold_together(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], says: str
) -> None:
    launched(monkeypatch, **changes)
    with pytest.raises(ConfigError, match=says):
        meeting.require_announced()


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch, RANK="1", LOCAL_RANK="1")
    meeting.require_announced()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"LOCAL_RANK=1, and this process sees 1 GPUs; .*CUDA_VISIBLE_DEVICES"):
        meeting.require_announced()


def test_ranks_that_do_not_come_are_counted(port: str) -> None:
    started = time.monotonic()
    says = rf"1 of WORLD_SIZE=2 ranks came to MASTER_ADDR=127.0.0.1, MASTER_PORT={port} within parallel.ddp_timeout=2 s"
    with pytest.raises(PeerLostError, match=says), meeting.meeting(TIMEOUT):
        meeting.loopback_store(TIMEOUT, 0, 2)
    assert time.monotonic() - started < 10


def test_a_port_that_is_taken_is_named(port: str) -> None:
    says = f"MASTER_PORT={port} cannot be listened at .*--master_port"
    with socket.create_server(("127.0.0.1", int(port))), pytest.raises(ConfigError, match=says):
        meeting.loopback_store(TIMEOUT, 0, 2)


SCRIPT = """
import sys
from datetime import timedelta
from dpo_dist.distributed import process_group
from dpo_dist.errors import DpoDistError
try:
    with process_group(timedelta(seconds=2)):
        pass
except DpoDistError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    ("rank", "address", "says"),
    [
        ("1", "127.0.0.1", "PeerLostError RANK=1 did not reach the first rank at MASTER_ADDR=127.0.0.1, MASTER_PORT="),
        ("1", "no-such-host.invalid", "PeerLostError RANK=1 did not reach the first rank at MASTER_ADDR=no-such-host"),
        ("0", "127.0.0.1", "ConfigError MASTER_PORT=.* cannot be listened at .*HEAD=name:port"),
    ],
    ids=["nobody there", "no such host", "port taken"],
)
def test_several_machines(tmp_path: Path, rank: str, address: str, says: str) -> None:
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        if rank == "1":
            taken.close()
        env = {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
        env |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
        command = [sys.executable, "-c", SCRIPT]
        done = subprocess.run(command, env=os.environ | env, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert re.search(says, done.stdout), done.stdout + done.stderr[-2000:]


def test_an_interface_that_is_not_there() -> None:
    env = {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29519"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | env | {"GLOO_SOCKET_IFNAME": "nope"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "ConfigError GLOO_SOCKET_IFNAME=nope names no interface of this machine" in done.stdout, done.stderr


def test_it_is_nobodys_mistake_here() -> None:
    assert is_peer_lost(PeerLostError("1 of 2 ranks came"))
