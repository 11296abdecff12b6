"""What ZeRO's collectives over gloo give beside torch's: three ranks of `tests.processes.gloo_worker FOLDER`.

Each rank writes `RANK.json`: names of the cases that differ, and what DeepSpeed's own calls lead to.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from dpo_dist.distributed import process_group
from dpo_dist.engine import adopt_process_group, release_process_group
from dpo_dist.engine.gloo import all_gather_into_tensor, reduce_scatter_tensor
from tests.launching import end_rank

SIZES = (0, 1, 7, 4096, 100_003)


def part_of(rank: int, size: int, dtype: torch.dtype) -> Tensor:
    """Values of one rank, which every rank can make; negative zeros among them."""
    values = torch.randn(size, generator=torch.Generator().manual_seed(1000 * rank + size))
    values[::5] = -0.0
    return (10 * values).to(dtype)


def gathered(members: list[int], group: Any) -> Iterator[tuple[str, bool]]:
    """Whether each gather has every rank's values, in the order of ranks."""
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        for size in SIZES:
            own, count = part_of(dist.get_rank(), size, dtype), len(members)
            expected = torch.cat([part_of(rank, size, dtype) for rank in members])
            apart, inside = torch.full((2, count * size), 3, dtype=dtype)
            all_gather_into_tensor(apart, own, group=group)
            place = inside.view(count, size)[dist.get_rank(group)]
            place.copy_(own)
            work = all_gather_into_tensor(inside, place, group=group, async_op=True)
            assert work is not None
            work.wait()
            for how, values in (("apart", apart), ("inside", inside)):
                same = torch.equal(values.view(torch.uint8), expected.view(torch.uint8))
                yield f"gather {how} {dtype} {size} of {members}", same


def scattered(members: list[int], group: Any) -> Iterator[tuple[str, bool]]:
    """Whether each rank's part of the sums is the sum in float64, and that of two ranks exactly theirs."""
    count, place = len(members), dist.get_rank(group)
    for size in SIZES:
        whole = [part_of(rank, count * size, torch.float32) for rank in members]
        exact = whole[0] + whole[1] if count == 2 else torch.stack(whole).double().sum(0)
        expected = exact.double().view(count, size)[place]
        apart, inside = torch.empty(size), whole[place].clone()
        reduce_scatter_tensor(apart, whole[place].clone(), group=group)
        own = inside.view(count, size)[place]
        work = reduce_scatter_tensor(own, inside, group=group, async_op=True)
        assert work is not None
        work.wait()
        bound = 0.0 if count == 2 else 1e-6
        for how, values in (("apart", apart), ("inside", own)):
            near = torch.allclose(values.double(), expected, rtol=bound, atol=10 * bound)
            yield f"sum {how} {size} of {members}", near
    largest = torch.empty(1)
    reduce_scatter_tensor(largest, torch.full((count,), float(dist.get_rank())), op=dist.ReduceOp.MAX, group=group)
    yield f"largest of {members}", largest.item() == members[-1]


def of_deepspeed() -> dict[str, Any]:
    """What DeepSpeed's own gather and sum give, and which functions they call."""
    backend, rank = deepspeed.comm.comm.cdb, dist.get_rank()
    everybody, own = torch.empty(3), torch.empty(1)
    deepspeed.comm.all_gather_into_tensor(everybody, torch.tensor([float(rank)]))
    deepspeed.comm.reduce_scatter_tensor(own, torch.arange(3.0))
    ours = [backend.all_gather_function is all_gather_into_tensor]
    ours.append(backend.reduce_scatter_function is reduce_scatter_tensor)
    return {"ours": ours, "gathered": everybody.tolist(), "sum": own.item()}


def refused() -> bool:
    """Whether an output that does not fit is refused before anything is sent."""
    try:
        all_gather_into_tensor(torch.empty(4), torch.empty(1))
    except RuntimeError:
        return True
    return False


if __name__ == "__main__":
    with process_group() as ranks:
        adopt_process_group()
        pair = dist.new_group([1, 2])
        found = [*gathered([0, 1, 2], None), *scattered([0, 1, 2], None)]
        if ranks.rank:
            found += [*gathered([1, 2], pair), *scattered([1, 2], pair)]
        seen = {"cases": len(found), "differ": [name for name, same in found if not same], "refused": refused()}
        seen["deepspeed"] = of_deepspeed()
        (Path(sys.argv[1]) / f"{ranks.rank}.json").write_text(json.dumps(seen), encoding="utf-8")
        release_process_group()
    end_rank()
