"""What torch's recorder tells of the collectives of this process."""

import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dpo_dist import flight_recorder
from dpo_dist.flight_recorder import last_collectives, without_waiting, write_trace
from tests.tiny_engine import only_rank


def test_collectives_are_counted_and_shown() -> None:
    only_rank()
    before, _ = last_collectives(on_gpu=False)
    dist.all_reduce(torch.ones(3, 5))
    dist.barrier()
    after, lines = last_collectives(on_gpu=False)
    assert after == before + 2
    assert (
        lines[-2].startswith(f"  {after - 1}: gloo:all_reduce of [3, 5], ") and "gloo:barrier of nothing" in lines[-1]
    )
    for _ in range(30):
        dist.barrier()
    assert last_collectives(on_gpu=False)[0] == after + 30 and len(last_collectives(on_gpu=False)[1]) == 20


@pytest.mark.parametrize("answer", [b"no json", b"[]", b'{"entries": [{}]}', None])
def test_what_torch_may_change_is_no_stumbling_block(monkeypatch: pytest.MonkeyPatch, answer: bytes | None) -> None:
    if answer is None:
        monkeypatch.delattr(flight_recorder._c10d, "_dump_fr_trace_json")
    else:
        monkeypatch.setattr(flight_recorder._c10d, "_dump_fr_trace_json", lambda: answer)
    assert last_collectives(on_gpu=False) == (0, [])


def test_a_recorder_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flight_recorder, "_PATIENCE", 0.1)
    forever = threading.Event()
    assert without_waiting(lambda: forever.wait(60) and 1, 7) == 7
    assert without_waiting(lambda: 1, 7) == 1
    forever.set()


def test_the_trace_of_nccl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_trace(tmp_path / "nccl-0")  # a build without NCCL has none
    monkeypatch.setattr(flight_recorder._c10d, "_dump_nccl_trace", lambda: b"trace", raising=False)
    write_trace(tmp_path / "nccl-0")
    assert (tmp_path / "nccl-0").read_bytes() == b"trace"
    write_trace(tmp_path / "nowhere/nccl-0")
