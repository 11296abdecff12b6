"""What all ranks do together on the file system: an error of one is raised on all."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from dpo_dist.checkpoint.files import explain_write_error
from dpo_dist.distributed import Ranks, broadcast_json, raise_together

T = TypeVar("T")


def on_every_rank(folder: Path, action: Callable[[], T], needed: int = 0) -> T:
    """What the action returns on this rank; if it fails on any rank, every rank raises. Collective.

    Args:
        folder: where it writes, for the message.
        action: what is done.
        needed: bytes it is known to need; 0 if nothing is known.
    """
    result, error = None, None
    try:
        result = action()
    except Exception as failure:  # whatever it is, the other ranks must hear of it
        error = explain_write_error(failure, folder, needed)
    raise_together(error)
    return result  # type: ignore[return-value]  # raise_together has raised unless the action returned


def on_first_rank(ranks: Ranks, folder: Path, action: Callable[[], Any], needed: int = 0) -> Any:
    """What the action returns on the first rank, as JSON carries it; its error is raised on every rank. Collective."""
    return broadcast_json(on_every_rank(folder, lambda: action() if ranks.is_first else None, needed))
