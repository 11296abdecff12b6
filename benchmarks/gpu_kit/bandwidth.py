"""How fast ranks exchange: the part, and what its ranks run (torchrun -m benchmarks.gpu_kit.bandwidth OUT BYTES...)."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu_kit.ceilings import share_of_copy
from benchmarks.gpu_kit.clock import seconds_of_ranks
from benchmarks.gpu_kit.kit import Kit, Skipped
from dpo_dist.cli.ending import end_rank
from dpo_dist.distributed import process_group


def bandwidth(kit: Kit) -> dict[str, Any]:
    """All-reduce and all-gather over all ranks, by message size."""
    if kit.num_ranks < 2:
        raise Skipped("one rank has nobody to exchange with")
    out = kit.work / "bandwidth.json"
    kit.run(kit.num_ranks, "bandwidth", __name__, str(out), *map(str, kit.sizes.messages), limit=120)
    found = json.loads(out.read_text(encoding="utf-8"))
    for line in found["sizes"]:
        for name in ("all_reduce", "all_gather"):
            line[f"{name}_share_of_copy"] = share_of_copy(kit, line[f"{name}_gb_per_second"])
    return found


def sweep(sizes: list[int], num_ranks: int, device: torch.device) -> list[dict[str, float]]:
    """A line for each size; bus bandwidth as nccl-tests define it, in 10^9 bytes per second.

    Args:
        sizes: bytes of the whole message, in bfloat16.
        num_ranks: of the group.
        device: this rank's.
    """
    lines = []
    for size in sizes:
        elements = size // 2 // num_ranks * num_ranks
        whole = torch.zeros(elements, dtype=torch.bfloat16, device=device)
        part = torch.zeros(elements // num_ranks, dtype=torch.bfloat16, device=device)
        reduce_seconds = seconds_of_ranks(lambda whole=whole: dist.all_reduce(whole), device)
        gather_seconds = seconds_of_ranks(
            lambda whole=whole, part=part: dist.all_gather_into_tensor(whole, part), device
        )
        on_the_bus = 2 * elements * (num_ranks - 1) / num_ranks
        lines.append(
            {
                "bytes": 2 * elements,
                "all_reduce_seconds": reduce_seconds,
                "all_reduce_gb_per_second": 2 * on_the_bus / reduce_seconds / 1e9,
                "all_gather_seconds": gather_seconds,
                "all_gather_gb_per_second": on_the_bus / gather_seconds / 1e9,
            }
        )
    return lines


def main() -> None:
    """Measure; the first rank writes."""
    out, *sizes = sys.argv[1:]
    with process_group() as ranks:
        lines = sweep([int(size) for size in sizes], ranks.world_size, ranks.device)
        if ranks.is_first:
            backend = "nccl" if ranks.device.type == "cuda" else "gloo"
            content = {"ranks": ranks.world_size, "backend": backend, "dtype": "bfloat16", "sizes": lines}
            Path(out).write_text(json.dumps(content), encoding="utf-8")


if __name__ == "__main__":
    main()
    end_rank(0)
