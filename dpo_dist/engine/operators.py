"""DeepSpeed's operators in C++, which it compiles at their first use, and the locks that a killed compilation leaves.

torch lets one process compile and the others wait for the end of a file `lock`. Where the first one is killed the file
stays, and everybody waits for ever, in silence. So ranks come in here one after another, under a lock of the system,
which frees it with its process; whoever holds it may judge torch's.
"""

import fcntl
import io
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.git_version_info import installed_ops
from torch.utils.cpp_extension import _get_build_directory

from dpo_dist.distributed import is_first_of_node

logger = logging.getLogger(__name__)

QUIET = 600.0  # seconds without a change, after which a lock of an unknown holder is dead; to compile may take 300
SAY_EVERY = 30.0  # seconds
_SETTLED = 3.0  # seconds; the same where our own note says that its holder died on this machine
_PAUSE = 0.1
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def load_operator(builder_name: str) -> None:
    """Have an operator loaded, and compiled if need be, before DeepSpeed asks for it.

    Args:
        builder_name: DeepSpeed's class, such as "ShareMemCommBuilder".
    """
    accelerator: Any = get_accelerator()
    builder: Any = accelerator.create_op_builder(builder_name)
    if builder is None or not deepspeed.ops.__compatible_ops__.get(builder.NAME, False):
        return
    folder = Path(_get_build_directory(builder.name, verbose=False))
    is_built = (folder / f"{builder.name}.so").is_file() or installed_ops.get(builder.NAME, False)
    if not is_built and is_first_of_node():
        logger.info(
            "DeepSpeed compiles its operator %s, once on this machine: about a minute, in %s", builder.name, folder
        )
    with only_compiler(folder), redirect_stdout(io.StringIO()):  # some lines of what ninja does
        builder.load()


@contextmanager
def only_compiler(folder: Path) -> Iterator[None]:
    """Inside, no other rank of ours compiles in this folder, and torch's lock was free at the entry.

    Where the file system knows no locks a dead lock of torch is told of, and never removed.
    """
    own = folder.with_name(f".{folder.name}.dpo_dist")
    descriptor = _take(own)
    try:
        _await_torch(folder, descriptor)
        if descriptor is not None:
            _note(descriptor, _boot_id())
        yield
    finally:
        if descriptor is not None:
            _note(descriptor, "")
            os.close(descriptor)


def _take(path: Path) -> int | None:
    """An open file under the system's lock; None where there is none to be had."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError:
        return None
    say = _repeated()
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if is_first_of_node():  # the others wait for it most of the time
                say(f"waiting for another process, which compiles or loads DeepSpeed's operator in {path.parent}")
            time.sleep(_PAUSE)
        except OSError:
            os.close(descriptor)
            return None


def _await_torch(folder: Path, descriptor: int | None) -> None:
    lock, say = folder / "lock", _repeated()
    while lock.exists():
        died_here = descriptor is not None and _boot_id() != "" and _noted(descriptor) == _boot_id()
        if descriptor is not None and is_dead(lock, _SETTLED if died_here else QUIET):
            with suppress(FileNotFoundError):
                lock.unlink()
                logger.warning("%s was left by a process that was killed; it is removed", lock)
            continue
        say(
            f"waiting for {lock}, with which another process compiles DeepSpeed's operator; if none does on any "
            "machine that shares this folder, remove that file"
        )
        time.sleep(_PAUSE)


def is_dead(lock: Path, quiet: float) -> bool:
    """Whether nobody holds a lock of torch any more.

    Its holder keeps it open, and the compiler works in its folder; what was killed may leave a compiler behind. Other
    machines and containers cannot be seen, and may share the folder: only time tells of them.

    Args:
        lock: the file, whose folder is that of the operator.
        quiet: seconds for which nothing in the folder has changed.
    """
    try:
        changed = max(path.stat().st_mtime for path in (lock, lock.parent, *lock.parent.iterdir()))
        # A clock that is off (another machine's) makes it younger than it is: it is only waited for longer.
        return time.time() - changed >= quiet and not _is_used_here(lock)
    except OSError:
        return not lock.exists()


def _is_used_here(lock: Path) -> bool:
    """Whether a process of this machine has the lock open or works in its folder; also where that cannot be known."""
    owner, processes = lock.stat().st_uid, list(Path("/proc").glob("[0-9]*"))
    return not processes or any(_uses(process, lock, owner) for process in processes)


def _uses(process: Path, lock: Path, owner: int) -> bool:
    with suppress(OSError):  # it has ended
        if (process / "cwd").samefile(lock.parent):
            return True
    try:
        open_files = list((process / "fd").iterdir())
    except PermissionError:  # it cannot be looked into; only one of the lock's owner can have made the lock
        with suppress(OSError):
            return process.stat().st_uid == owner
        return False
    except OSError:
        return False
    return any(_is_link_to(link, lock) for link in open_files)


def _is_link_to(link: Path, lock: Path) -> bool:
    with suppress(OSError):  # closed meanwhile
        # By its name first: to look at any file, such as one of a server that is down, may take for ever.
        return link.readlink().name == lock.name and link.samefile(lock)
    return False


def _boot_id() -> str:
    """Names the running system, whose locks end with their processes; "" where it has no name."""
    with suppress(OSError):
        return _BOOT_ID.read_text(encoding="ascii").strip()
    return ""


def _noted(descriptor: int) -> str:
    return os.pread(descriptor, 100, 0).decode(errors="replace")


def _note(descriptor: int, text: str) -> None:
    """Who compiles now: what is still there when the lock is free is of one that was killed."""
    with suppress(OSError):  # a full disk: a lock is then judged by its age
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)


def _repeated() -> Callable[[str], None]:
    """Says a line again and again, seldom enough to be read; not at once, for most waiting is short."""
    last = time.monotonic()

    def say(line: str) -> None:
        nonlocal last
        if time.monotonic() - last >= SAY_EVERY:
            last = time.monotonic()
            logger.warning(line)

    return say
