"""What a process may take of its machine, and keeps."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from dpo_dist import machine

FAULTS = """
import resource, sys
import torch
from dpo_dist.machine import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()

def faults():
    torch.empty(1 << 24).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for _ in range(20):  # the heap grows until it has a place
    before = faults()
for _ in range(10):
    after = faults()
print(after - before)
"""


def pages(argument: str) -> int:
    """Pages that ten tensors of 64 MiB, one after another, made the kernel hand out."""
    done = subprocess.run([sys.executable, "-c", FAULTS, argument], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_freed_memory_is_kept() -> None:
    assert pages("keep") < 100 < 1000 < pages("as it was")


@pytest.mark.parametrize(
    ("limit", "ranks", "expected"),
    [(None, 1, 1000), (None, 4, 250), (800, 1, 700), (800, 4, 100), (80, 1, 0), (100_000, 1, 1000)],
)
def test_memory_of_a_rank(monkeypatch: pytest.MonkeyPatch, limit: int | None, ranks: int, expected: int) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    own = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=100))
    monkeypatch.setattr(psutil, "Process", lambda: own)
    monkeypatch.setattr(machine, "memory_of_container", lambda: limit)
    assert machine.free_bytes(torch.device("cpu"), ranks) == expected


def test_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"mem_get_info": (50, 100), "memory_reserved": 30, "memory_allocated": 20}.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    assert machine.free_bytes(torch.device("cuda"), 8) == 60


def test_torch_is_deterministic_inside_only() -> None:
    settings: Any = torch.utils.deterministic
    fills = settings.fill_uninitialized_memory
    for wanted in (False, True):
        with machine.deterministic_algorithms(wanted):
            assert torch.are_deterministic_algorithms_enabled() == wanted
            assert torch.is_deterministic_algorithms_warn_only_enabled() == wanted
            assert settings.fill_uninitialized_memory == (fills and not wanted)
        assert not torch.are_deterministic_algorithms_enabled()
        assert settings.fill_uninitialized_memory == fills


def test_what_torch_was_before_it_is_again() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        with machine.deterministic_algorithms(True):
            assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
