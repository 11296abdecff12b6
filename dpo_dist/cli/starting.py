"""What every command begins with: where the cache is, imports that are quick and quiet, and how a mistake is shown."""

import gc
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from dpo_dist.cli.ending import is_out_of_memory, out_of_memory, tell_launcher
from dpo_dist.cli.redaction import redacted
from dpo_dist.errors import ConfigError, DpoDistError
from dpo_dist.peers import is_peer_lost, peer_lost
from dpo_dist.phases import arm

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a shipped one.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Values that replace those of the file.")
]


def cache_dir() -> Path:
    """Where converted models and tokenised data are kept: $DPO_DIST_CACHE, else the user's cache folder."""
    if own := os.environ.get("DPO_DIST_CACHE"):
        return Path(own).expanduser()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dpo_dist"
    except RuntimeError:  # as in a container whose user is a number
        raise ConfigError("this user has no home folder; set DPO_DIST_CACHE to a folder for the cache") from None


@contextmanager
def importing() -> Iterator[None]:
    """Inside, packages are imported, in a fifth less time.

    They make very many objects that stay, and the garbage collector looks through them again and again. It is off
    meanwhile, and leaves them alone afterwards.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def quiet_imports() -> None:
    """Settle what other packages would otherwise print while they are imported and used."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # a progress bar in a log is a line for every change
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler reports on itself
    # It says at its import which kernels it lacks, whether or not anything is quantised.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with importing():
        import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


@contextmanager
def user_errors() -> Iterator[None]:
    """Show a user's mistake once, without a traceback, and leave with its exit code."""
    try:
        testing = os.environ.get("DPO_DIST_TESTING") == "1"
        arm(os.environ.get("DPO_DIST_FAULT", "") if testing else "", int(os.environ.get("RANK", "0")))
        yield
    except Exception as raised:
        error = peer_lost(raised) if is_peer_lost(raised) else raised
        if not isinstance(error, DpoDistError) and not is_out_of_memory(error):
            raise
        rank = int(os.environ.get("RANK", "0"))
        if rank:
            # The first rank has most likely met the same mistake and says it; its launcher then ends this process.
            # Only a rank that fails alone lives to speak.
            time.sleep(15)
        said = str(error) if isinstance(error, DpoDistError) else out_of_memory(error)
        text = redacted((f"error on rank {rank}: " if rank else "error: ") + said)
        print(text, file=sys.stderr, flush=True)
        tell_launcher(text)
        raise typer.Exit(getattr(error, "exit_code", 1)) from None
