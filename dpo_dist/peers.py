"""What it looks like when another rank is gone or hangs, in the words of gloo, NCCL and torch's store.

A collective that fails for this reason must not be taken for a mistake of the user by whatever loads models or shards
around it: job scripts start a run again after one and not after the other. Imports no torch.
"""

import re

from dpo_dist.errors import DpoDistError, PeerLostError

_WORDS = (
    "Connection closed by peer",  # gloo
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "Application timeout caused pair closure",
    "Connection closed by remote peer",  # NCCL
    "remote process exited",
    "ncclRemoteError",
    "NCCL communicator was aborted",
    "Watchdog caught collective operation timeout",
    "wait timeout after",  # the store
    "failed to recv, got 0 bytes",
    "Connection was likely closed",
)
_KINDS = frozenset({"DistNetworkError", "DistStoreError"})
_OWN_PORT = "failed to listen"  # the same class; nobody is lost


def is_peer_lost(error: BaseException | None) -> bool:
    """Whether an error, or what it says to come from, is that of a collective whose other side is gone.

    Only of RuntimeError and its kinds, as torch raises them: a download or a disk loses connections as well.
    """
    while error is not None:
        if isinstance(error, PeerLostError):
            return True
        if isinstance(error, RuntimeError) and not isinstance(error, DpoDistError) and _OWN_PORT not in str(error):
            by_kind = any(kind.__name__ in _KINDS for kind in type(error).__mro__)
            if by_kind or any(words in str(error) for words in _WORDS):
                return True
        error = error.__cause__
    return False


def peer_lost(error: BaseException) -> PeerLostError:
    """What a user is told of it."""
    if isinstance(error, PeerLostError):
        return error
    while error.__cause__ is not None:
        error = error.__cause__
    # "[.../gloo/transport/tcp/pair.cc:537] Read error [...]: Connection reset by peer. This is typically ..."
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    detail = re.sub(r"^\[[^\]]*\] ", "", line).split(". ")[0]
    return PeerLostError(
        f"another rank is gone or hangs ({detail}); see its own message above, or parallel.ddp_timeout if it was only "
        "slow, and start again with checkpoint.resume=auto"
    )


def raise_if_peer_lost(error: BaseException) -> None:
    """To be called before an error is turned into a mistake of the user.

    Raises:
        PeerLostError: it is none.
    """
    if is_peer_lost(error):
        raise peer_lost(error) from error
