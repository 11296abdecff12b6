"""How a rank ends: its exit code, and its last words for the user and the launcher."""

import atexit
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from dpo_dist.cli.redaction import redacted


def end_rank(exit_code: int) -> NoReturn:
    """End a rank as Python does, and do not take the interpreter apart.

    DeepSpeed's hooks refer to themselves in circles and keep process groups with their threads alive; now and then one
    of these aborts a process whose work is done and saved, and its launcher reports a failed run.
    """
    # What Python does first: pools are told that nothing will come any more, or their threads would be waited for in
    # vain; then all threads are waited for.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()  # trackers and others have something to say
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def give_up(text: str) -> NoReturn:
    """End a process in which another thread hangs, with exit code 1."""
    rank = int(os.environ.get("RANK", "0"))
    text = redacted((f"error on rank {rank}: " if rank else "error: ") + text)
    try:
        print(text, file=sys.stderr, flush=True)
        tell_launcher(text)
    finally:
        os._exit(1)


@contextmanager
def leaving_when_asked() -> Iterator[None]:
    """Inside, SIGTERM, SIGINT and SIGUSR1 end this process with exit code 0: there is nothing to save yet.

    Ranks cannot agree before they have met. Launchers and Slurm tell all of them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        if os.environ.get("RANK", "0") == "0":
            print(f"{signal.Signals(number).name}: stopped before the first step", file=sys.stderr, flush=True)
        raise SystemExit(0)

    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    former = {number: signal.signal(number, leave) for number in signals}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def tell_launcher(text: str) -> None:
    """Leave the message where torchrun looks for it: its report, the last thing it prints, repeats it."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        Path(path).write_text(json.dumps({"message": text, "timestamp": int(time.time())}), encoding="utf-8")


_FEWER_TOKENS = "lower packing.max_tokens or packing.reference_max_tokens"
_OTHER_FILE = (
    "or take a DeepSpeed file that shards or offloads more (zero3, zero3_offload; with _bf16 behind it where yours has)"
)
# Memory may run out before, or where, nothing is known of the configuration: what it says must be true of any.
_MORE_ROOM = f"{_FEWER_TOKENS}, set model.gradient_checkpointing=true if it is not, {_OTHER_FILE}"
WITHOUT_RECOMPUTATION = f"{_FEWER_TOKENS}, {_OTHER_FILE}"  # where all layers recompute already, or none can

_ADVICE = "dpo-dist: "  # notes of others may be there too


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, of a device or of the host; by name, for torch may not have been imported yet."""
    told = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    return told or isinstance(error, MemoryError)


@contextmanager
def advising(advice: str) -> Iterator[None]:
    """Inside, memory that runs out gets this advice of `out_of_memory`; empty: the general one."""
    try:
        yield
    except Exception as error:
        if advice and is_out_of_memory(error):
            error.add_note(_ADVICE + advice)
        raise


def out_of_memory(error: Exception) -> str:
    """What to do about such an error."""
    first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    notes: list[str] = getattr(error, "__notes__", [])
    advice = next((note.removeprefix(_ADVICE) for note in notes if note.startswith(_ADVICE)), _MORE_ROOM)
    return f"out of memory; {advice} ({first_line})"
