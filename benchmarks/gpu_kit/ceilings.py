"""What a device can do at best: the part, and what its ranks run (torchrun -m benchmarks.gpu_kit.ceilings OUT ...).

All ranks measure at the same time, as they do when they train: on a CPU they share it. Every rate of the other parts
stands beside its share of these two.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_kit.clock import seconds_of_ranks
from benchmarks.gpu_kit.kit import Kit
from dpo_dist.cli.ending import end_rank
from dpo_dist.distributed import process_group

LAUNCH_SECONDS = 60.0
PRODUCTS = 4  # in one measurement, so that starting them does not count


def ceilings(kit: Kit) -> dict[str, Any]:
    """A large matrix product and a large copy, once; the parts after it find them in `kit.ceilings`."""
    out = kit.work / "ceilings.json"
    sizes = map(str, (kit.sizes.product_side, kit.sizes.copy_bytes))
    kit.run(kit.num_ranks, "ceilings", __name__, str(out), *sizes, limit=LAUNCH_SECONDS)
    kit.ceilings = json.loads(out.read_text(encoding="utf-8"))
    return kit.ceilings


def share_of_products(kit: Kit, tflops: float, num_ranks: int | None = None) -> float | None:
    """The share of what products reach on some ranks, by default on all; None where that was not measured."""
    if not kit.ceilings:
        return None
    return tflops / (kit.ceilings["product_tflops_of_a_rank"] * (num_ranks or kit.num_ranks))


def share_of_copy(kit: Kit, gb_per_second: float) -> float | None:
    """The share of what a copy reaches on one rank; None where that was not measured."""
    return gb_per_second / kit.ceilings["copy_gb_per_second_of_a_rank"] if kit.ceilings else None


def speeds(side: int, num_bytes: int, device: torch.device) -> dict[str, Any]:
    """Of the slowest rank. A copy reads and writes: both count.

    Args:
        side: of the two square matrices that are multiplied.
        num_bytes: that are copied.
        device: this rank's.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    # Random numbers: zeros let a GPU run faster than any real product does.
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)

    def multiply() -> None:
        for _ in range(PRODUCTS):
            torch.mm(left, right, out=product)

    multiply_seconds = seconds_of_ranks(multiply, device) / PRODUCTS
    source = torch.randn(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    copy_seconds = seconds_of_ranks(lambda: target.copy_(source), device)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "product_side": side,
        "product_seconds": multiply_seconds,
        "product_tflops_of_a_rank": 2 * side**3 / multiply_seconds / 1e12,
        "copy_bytes": 4 * source.numel(),
        "copy_seconds": copy_seconds,
        "copy_gb_per_second_of_a_rank": 2 * 4 * source.numel() / copy_seconds / 1e9,
    }


def main() -> None:
    """Measure; the first rank writes."""
    out, side, num_bytes = sys.argv[1:]
    with process_group() as ranks:
        found = speeds(int(side), int(num_bytes), ranks.device)
        if ranks.is_first:
            content = {"ranks": ranks.world_size, "device": ranks.device.type, **found}
            Path(out).write_text(json.dumps(content), encoding="utf-8")


if __name__ == "__main__":
    main()
    end_rank(0)
