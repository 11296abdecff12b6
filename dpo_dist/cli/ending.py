"""How a rank ends: its exit code, and its last words for the launcher."""

import atexit
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

from dpo_dist.cli.redaction import redacted


def end_rank(exit_code: int) -> NoReturn:
    """End a rank as Python does, and do not take the interpreter apart.

    DeepSpeed's hooks refer to themselves in circles and keep process groups with their threads alive; now and then one
    of these aborts a process whose work is done and saved, and its launcher reports a failed run.
    """
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
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


def tell_launcher(text: str) -> None:
    """Leave the message where torchrun looks for it: its report, the last thing it prints, repeats it."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        Path(path).write_text(json.dumps({"message": text, "timestamp": int(time.time())}), encoding="utf-8")
