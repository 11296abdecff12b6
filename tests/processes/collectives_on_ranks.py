"""What every rank sees of each collective, as JSON: `torchrun -m tests.processes.collectives_on_ranks FOLDER`."""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from dpo_dist.distributed import (
    Ranks,
    StopRequest,
    all_gather_json,
    barrier,
    broadcast_json,
    broadcast_tensor,
    join_over_ranks,
    launched_rank,
    process_group,
    raise_together,
    raising_together,
    require_agreement,
    sum_over_ranks,
)
from dpo_dist.errors import DataError
from tests.launching import end_rank

LONG = "x" * 70_000


def outcome(function: Callable[[], Any]) -> list[str]:
    """Class and message of what a call raises; an empty list if nothing."""
    try:
        function()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return []


def listening() -> list[str]:
    """Addresses at which this process can be reached, those of the store included."""
    sockets = [one for one in psutil.Process().net_connections("tcp") if one.status == psutil.CONN_LISTEN]
    return [one.laddr.ip for one in sockets]


class OurOwnError(Exception):
    """An error the package does not know."""


def observations(ranks: Ranks) -> dict[str, Any]:
    """The same calls on every rank, with arguments that differ between ranks."""
    rank = ranks.rank
    stop = StopRequest()
    with stop.listening():
        before = sum_over_ranks(stop.as_tensor(ranks.device)).item()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        after = sum_over_ranks(stop.as_tensor(ranks.device)).item()
    parts, at_first = torch.tensor([0.1 + rank, 0.0]).roll(rank), torch.tensor([0.1 + rank, 0.0]).roll(rank)
    join_over_ranks(parts)
    join_over_ranks(at_first, first_rank_only=True)
    numbers = torch.tensor([7 + rank, rank], dtype=torch.uint8)
    broadcast_tensor(numbers)

    def second_fails() -> None:
        with raising_together():
            if rank:
                raise DataError("b.jsonl:9: bad")

    seen = {
        "joined": parts.tolist(),
        "joined at the first": at_first.tolist() if rank == 0 else [],
        "broadcast tensor": numbers.tolist(),
        "second fails inside": outcome(second_fails),
        "interface": os.environ.get("GLOO_SOCKET_IFNAME"),
        "listens": listening(),
        "rank": [ranks.rank, ranks.world_size, ranks.local_rank, launched_rank(), ranks.is_first],
        "unequal": all_gather_json([None, {"text": "\u00e9\u4e2d\U0001f600" * 5, "number": 0.1}][rank]),
        "long": [len(text) for text in all_gather_json(LONG if rank else "")],
        "empty": all_gather_json([]),
        "broadcast": broadcast_json({"from": rank}),
        "sum": sum_over_ranks(torch.tensor([1.0 + rank, 1e-9], dtype=torch.float32)).tolist(),
        "nobody fails": outcome(lambda: raise_together(None)),
        "second fails": outcome(lambda: raise_together(DataError("b.jsonl:7: bad \u00e9") if rank else None)),
        "both fail": outcome(lambda: raise_together(DataError(f"rank {rank}"))),
        "unknown": outcome(lambda: raise_together(OurOwnError("odd") if rank == 0 else None)),
        "agree": outcome(lambda: require_agreement({"the data": "same"})),
        "differ": outcome(lambda: require_agreement({"other": "same", "the data": f"hash{rank}"})),
        "stop": [before, after, stop.requested],
    }
    with process_group() as inner:  # one exists: it is used, and left alone
        seen["inner"] = inner == ranks
    seen["still there"] = all_gather_json(rank)
    barrier()
    return seen


if __name__ == "__main__":
    with process_group() as group:
        text = json.dumps(observations(group))
        (Path(sys.argv[1]) / f"{group.rank}.json").write_text(text, encoding="utf-8")
    assert not torch.distributed.is_initialized()
    end_rank()
