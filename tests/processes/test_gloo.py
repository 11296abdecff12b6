"""ZeRO's gathers and sums between CPU processes (`dpo_dist/engine/gloo.py`): values, places, groups of some ranks."""

import json
from typing import Any

import pytest

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
