"""The most memory a process has held."""

from pathlib import Path


def peak_bytes() -> int:
    """The largest resident set of this process since it began, bytes (VmHWM of Linux).

    Not `ru_maxrss`: that begins with the size of the process that started this one.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")))
