"""The few collectives we use, and what ranks agree on. Nothing pickles: what travels is a tensor, or JSON as bytes."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dpo_dist import errors
from dpo_dist.errors import DpoDistError, RankMismatchError


def barrier() -> None:
    """Wait until every rank is here; nothing to wait for without a process group."""
    if dist.is_initialized():
        # A CPU all-reduce: dist.barrier() on NCCL picks a device by guessing and can hang.
        dist.all_reduce(torch.zeros(1))


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, as a new CPU tensor in float64; the device-to-host copy of a step."""
    total = values.detach().to("cpu", torch.float64, copy=True)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


def join_over_ranks(parts: Tensor, first_rank_only: bool = False) -> None:
    """Put together, in place, a CPU tensor of which every rank has some elements, and 0 for those of the others.

    Exact in any precision: a value only ever meets zeros.

    Args:
        parts: the same shape on every rank.
        first_rank_only: the others' tensors are undefined afterwards, and less is sent.
    """
    if not dist.is_initialized():
        return
    if first_rank_only:
        dist.reduce(parts, dst=0)
    else:
        dist.all_reduce(parts)


def broadcast_tensor(values: Tensor) -> None:
    """Overwrite a CPU tensor with the first rank's, of the same shape and dtype."""
    if dist.is_initialized():
        dist.broadcast(values, src=0)


def all_gather_json(value: Any) -> list[Any]:
    """Every rank's JSON value, in rank order."""
    if not dist.is_initialized():
        return [value]
    payload = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, torch.tensor([len(payload)]))
    longest = max(int(length) for length in lengths)
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(payload)] = payload
    gathered = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(gathered, padded)
    return [
        json.loads(bytes(row[: int(length)].tolist()).decode()) for row, length in zip(gathered, lengths, strict=True)
    ]


def broadcast_json(value: Any) -> Any:
    """The first rank's JSON value, on every rank."""
    return all_gather_json(value if not dist.is_initialized() or dist.get_rank() == 0 else None)[0]


def raise_together(error: Exception | None) -> None:
    """Raise on every rank if any rank has an error, so that nobody waits for a rank that has gone.

    Raises:
        DpoDistError: the first rank's error in rank order, with its own class if it is one of ours.
    """
    mine = None if error is None else [type(error).__name__, str(error)]
    own_rank = dist.get_rank() if dist.is_initialized() else 0
    try:
        everybody = all_gather_json(mine)
    except RuntimeError:
        if error is None:
            raise
        raise error from None  # the others have gone, perhaps for the same reason: this rank's own tells more
    for rank, theirs in enumerate(everybody):
        if theirs is None:
            continue
        if error is not None and rank == own_rank:
            raise error
        name, message = theirs
        kind = getattr(errors, name, None)
        if isinstance(kind, type) and issubclass(kind, DpoDistError):
            raise kind(message)
        raise RuntimeError(f"rank {rank} failed: {name}: {message}")


@contextmanager
def raising_together() -> Iterator[None]:
    """An error inside is raised on every rank; see `raise_together`."""
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    raise_together(error)


def require_agreement(facts: Mapping[str, str]) -> None:
    """Every rank must hold the same values. Collective.

    Args:
        facts: values by what they are, for people.
    Raises:
        RankMismatchError: on every rank, naming the first fact that differs, with the ranks that differ from the first.
    """
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    if len(set(all_gather_json(digest))) == 1:
        return
    everybody = all_gather_json(dict(facts))
    for what in dict.fromkeys(name for theirs in everybody for name in theirs):
        values = [theirs.get(what, "nothing") for theirs in everybody]
        others = {rank: value for rank, value in enumerate(values) if value != values[0]}
        if others:
            listed = ", ".join(f"rank {rank}: {value}" for rank, value in list(others.items())[:4])
            raise RankMismatchError(
                f"{what} differs between ranks: rank 0: {values[0]}, {listed}; "
                "start every rank with the same configuration, data files, model folders and package versions"
            )
