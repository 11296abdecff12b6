"""ZeRO's gathers and sums between CPU processes (`dpo_dist/engine/gloo.py`): values, places, groups of some ranks."""

import json
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch.distributed as dist

from dpo_dist.engine import gloo
from tests.forking import fork_ranks
from tests.processes.gloo_worker import SIZES

GATHERS, SUMS = 2 * 3 * len(SIZES), 2 * len(SIZES) + 1


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of three ranks saw."""
    folder = tmp_path_factory.mktemp("gloo")
    result = fork_ranks(3, "tests.processes.gloo_worker", str(folder), cwd=folder, timeout=240)
    assert result.returncode == 0, result.stderr
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(3)]


def test_every_value_is_where_it_belongs(seen: list[dict[str, Any]]) -> None:
    assert [rank["differ"] for rank in seen] == [[], [], []]
    both = GATHERS + SUMS
    assert [rank["cases"] for rank in seen] == [both, 2 * both, 2 * both]


def test_deepspeed_gathers_and_adds_with_them(seen: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(seen):
        assert found["deepspeed"] == {"ours": [True, True], "gathered": [0, 1, 2], "sum": 3.0 * rank}


def test_an_output_that_does_not_fit_is_refused(seen: list[dict[str, Any]]) -> None:
    assert all(rank["refused"] for rank in seen)


def test_a_later_group_of_another_kind_has_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed keeps its backend, with what was set in it, beyond the end of a group."""
    backend = SimpleNamespace()
    monkeypatch.setattr(deepspeed.comm.comm, "cdb", backend)
    expected = {
        "gloo": (gloo.all_gather_into_tensor, gloo.reduce_scatter_tensor),
        "cpu:gloo,cuda:nccl": (dist.all_gather_into_tensor, dist.reduce_scatter_tensor),
    }
    for name, functions in expected.items():
        monkeypatch.setattr(dist, "get_backend", lambda name=name: name)
        gloo.gather_in_place()
        assert (backend.all_gather_function, backend.reduce_scatter_function) == functions
