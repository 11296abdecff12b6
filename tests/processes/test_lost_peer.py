"""A rank that is killed, or hangs, while the other one loads: no mistake of the user."""

import json
from pathlib import Path

import pytest

from tests.forking import fork_ranks


@pytest.mark.parametrize("how", ["killed", "hangs"])
def test_a_lost_rank_is_no_damaged_checkpoint(how: str, tmp_path: Path) -> None:
    result = fork_ranks(2, "tests.processes.lost_peer_worker", str(tmp_path), how, cwd=tmp_path, timeout=120)
    assert (tmp_path / "seen.json").is_file(), result.stderr
    seen = json.loads((tmp_path / "seen.json").read_text(encoding="utf-8"))
    name, message = seen["loading"]
    assert name == "PeerLostError", message
    assert message.startswith("another rank is gone or hangs (") and "checkpoint.resume=auto" in message
    assert seen["own"] == ["DataError", "b.jsonl:9: bad"]  # a mistake that the lost rank had as well
