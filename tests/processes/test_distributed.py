"""Collectives through one real group of two ranks over gloo, and what they are without a group."""

import json
import os
import signal
import threading
from typing import Any

import pytest
import torch

from dpo_dist.distributed import (
    StopRequest,
    all_gather_json,
    barrier,
    broadcast_json,
    groups,
    raise_together,
    require_agreement,
    sum_over_ranks,
)
from dpo_dist.errors import DataError
from tests.forking import fork_ranks


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks saw."""
    folder = tmp_path_factory.mktemp("ranks")
    result = fork_ranks(2, "tests.processes.collectives_on_ranks", str(folder), cwd=folder, timeout=240)
    assert result.returncode == 0, result.stderr
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


def both(seen: list[dict[str, Any]], key: str) -> Any:
    """What both ranks saw, which must be the same."""
    assert seen[0][key] == seen[1][key]
    return seen[0][key]


def test_ranks_know_who_they_are(seen: list[dict[str, Any]]) -> None:
    assert [one["rank"] for one in seen] == [[0, 2, 0, 0, True], [1, 2, 1, 1, False]]


@pytest.mark.parametrize(
    ("variables", "interface"),
    [
        ({}, "lo"),
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, "lo"),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, None),
        ({"WORLD_SIZE": "4"}, None),  # a launcher that does not say how many are here
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "eth0"}, "eth0"),
    ],
)
def test_ranks_of_one_machine_keep_to_it(
    variables: dict[str, str], interface: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(variables))
    groups._keep_to_loopback()
    assert os.environ.get("GLOO_SOCKET_IFNAME") == interface


def test_ranks_of_one_machine_listen_on_loopback_alone(seen: list[dict[str, Any]]) -> None:
    """gloo, and the store by which they find each other."""
    assert both(seen, "interface") == "lo"
    assert all(address.startswith("127.") for one in seen for address in one["listens"])
    assert len(seen[0]["listens"]) > len(seen[1]["listens"]) > 0, "the store is the first rank's"


@pytest.mark.parametrize(
    ("variables", "number"),
    [({}, 1), ({"LOCAL_WORLD_SIZE": "4"}, 4), ({"LOCAL_SIZE": "8"}, 8)],  # by hand, torchrun, DeepSpeed's launcher
)
def test_how_many_ranks_are_here(variables: dict[str, str], number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(variables))
    assert groups._ranks_per_node() == number


def test_json_of_unequal_length_travels_whole(seen: list[dict[str, Any]]) -> None:
    assert both(seen, "unequal") == [None, {"text": "\u00e9\u4e2d\U0001f600" * 5, "number": 0.1}]
    assert both(seen, "long") == [0, 70_000]
    assert both(seen, "empty") == [[], []]


def test_the_first_ranks_value_is_broadcast(seen: list[dict[str, Any]]) -> None:
    assert both(seen, "broadcast") == {"from": 0}


def test_parts_are_put_together_to_the_last_bit(seen: list[dict[str, Any]]) -> None:
    whole = torch.tensor([0.1, 1.1]).tolist()
    assert both(seen, "joined") == whole and [one["joined at the first"] for one in seen] == [whole, []]
    assert both(seen, "broadcast tensor") == [7, 0]


def test_sums_are_taken_in_float64(seen: list[dict[str, Any]]) -> None:
    small = torch.tensor(1e-9, dtype=torch.float32).double().item()
    assert both(seen, "sum") == [3.0, 2 * small]


def test_an_error_of_one_rank_is_raised_on_all(seen: list[dict[str, Any]]) -> None:
    assert both(seen, "second fails inside") == ["DataError", "b.jsonl:9: bad"]
    assert both(seen, "nobody fails") == []
    assert both(seen, "second fails") == ["DataError", "b.jsonl:7: bad \u00e9"]
    assert seen[0]["both fail"] == ["DataError", "rank 0"]
    assert seen[1]["both fail"][0] == "DataError"
    assert seen[0]["unknown"] == ["OurOwnError", "odd"]
    assert seen[1]["unknown"] == ["RuntimeError", "rank 0 failed: OurOwnError: odd"]


def test_disagreement_is_an_error_on_all_ranks_and_names_them(seen: list[dict[str, Any]]) -> None:
    assert both(seen, "agree") == []
    name, message = both(seen, "differ")
    assert name == "RankMismatchError"
    assert message.startswith("the data differs between ranks: rank 0: hash0, rank 1: hash1; start every rank with")


def test_a_stop_request_of_one_rank_is_seen_by_all(seen: list[dict[str, Any]]) -> None:
    assert [one["stop"] for one in seen] == [[0.0, 1.0, False], [0.0, 1.0, True]]


def test_a_group_that_exists_is_used_and_left_alone(seen: list[dict[str, Any]]) -> None:
    assert both(seen, "inner") is True
    assert both(seen, "still there") == [0, 1]


# ---- this process, alone: a group of one, or none


@pytest.mark.parametrize("value", [None, 1.5, "\u00e9", [1, {"a": None}]])
def test_one_process_is_its_own_group(value: Any) -> None:
    assert all_gather_json(value) == [value]
    assert broadcast_json(value) == value
    barrier()
    require_agreement({"anything": "x"})
    raise_together(None)
    with pytest.raises(DataError, match="mine"):
        raise_together(DataError("mine"))


def test_sum_of_one_process_is_a_copy() -> None:
    values = torch.tensor([1.0, 2.0], dtype=torch.float64)
    total = sum_over_ranks(values)
    total += 1
    assert values.tolist() == [1.0, 2.0]


# ---- signals


def test_a_signal_only_sets_a_flag_and_the_old_handler_comes_back() -> None:
    former = signal.getsignal(signal.SIGTERM)
    stop = StopRequest()
    with stop.listening() as listening:
        assert listening is stop
        assert stop.as_tensor(torch.device("cpu")).tolist() == [0.0]
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        assert stop.as_tensor(torch.device("cpu")).tolist() == [1.0]
        os.kill(os.getpid(), signal.SIGUSR1)  # again: still only a flag
    assert signal.getsignal(signal.SIGTERM) is former


def test_a_second_interrupt_ends_at_once() -> None:
    stop = StopRequest()
    with stop.listening():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_another_thread_leaves_signals_alone() -> None:
    handlers: list[Any] = []

    def listen() -> None:
        with StopRequest().listening():
            handlers.append(signal.getsignal(signal.SIGTERM))

    former = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert handlers == [former]
