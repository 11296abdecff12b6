"""What must be right about a run's surroundings before anything is read: its folder, its trackers' packages."""

import os
from importlib.util import find_spec
from pathlib import Path

from dpo_dist.config import RunConfig
from dpo_dist.errors import ConfigError
from dpo_dist.metrics import TRACKER_PACKAGES

LOCK_FILE = ".lock"
# What a start leaves that was killed before it wrote its configuration: nothing that a new run could spoil.
LEFTOVERS = frozenset({LOCK_FILE, "tensorboard"})
PROBE = ".doctor-"  # how the names begin of what `dpo-dist doctor` writes and removes


def require_no_gpu_meant(build: str, devices: Path = Path("/dev")) -> None:
    """Where torch finds no GPU, none may have been asked for, and none be there.

    Args:
        build: of torch, with its +cpu or +cu130.
        devices: where the system shows them.
    Raises:
        ConfigError: naming the variable, or the device.
    """
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    if "LOCAL_SIZE" in os.environ or asked in ("", "-1"):
        return  # DeepSpeed's launcher sets it without looking for GPUs
    present = sorted(devices.glob("nvidia[0-9]*"))
    if asked is None and not present:
        return
    meant = f"this machine has {present[0]}" if asked is None else f"CUDA_VISIBLE_DEVICES={asked} asks for GPUs"
    raise ConfigError(
        f"{meant}, and torch {build} finds none: install a build for CUDA, and look whether the driver answers "
        "(nvidia-smi); or set CUDA_VISIBLE_DEVICES= (empty) to compute on the CPU"
    )


def require_usable_output(config: RunConfig) -> None:
    """A folder that holds something is not written into, unless the run is to be resumed in it.

    Raises:
        ConfigError: naming the folder and the ways out.
    """
    require_possible_output(config)
    if in_use := output_in_use(config):
        raise ConfigError(in_use)


def require_possible_output(config: RunConfig) -> None:
    """The folder is there, or can be made.

    Raises:
        ConfigError: naming the folder and the ways out.
    """
    folder = Path(config.train.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"train.output_dir={folder} is a file; give a folder that is new or empty")
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK) or _is_virtual(parent):
        raise ConfigError(
            f"train.output_dir={folder} cannot be made: {parent} is not a writable folder; choose another"
        )


def who_trains(folder: Path) -> str | None:
    """Which process of this machine trains in a folder, in words; None if none is known to. Takes no lock itself."""
    path = folder / LOCK_FILE
    try:
        status, locks = path.stat(), Path("/proc/locks").read_text(encoding="ascii")
    except OSError:
        return None
    inode = f":{status.st_ino} "  # after the device's two numbers
    if not any(inode in line and " FLOCK " in line for line in locks.splitlines()):
        return None
    return path.read_text(encoding="utf-8", errors="replace") or "a process that has just started"


def output_in_use(config: RunConfig) -> str | None:
    """Why this run may not write into its folder, and the ways out; None where it may."""
    folder, resume = Path(config.train.output_dir), config.checkpoint.resume
    if not folder.is_dir():
        return None
    if all(path.name in LEFTOVERS or path.name.startswith(PROBE) for path in folder.iterdir()):
        return None
    if resume == "never":
        trainer = who_trains(folder)
        if trainer is not None:
            return f"train.output_dir={folder}: another run trains in this folder ({trainer}); choose another folder"
        return (
            f"train.output_dir={folder} is not empty; choose another folder, "
            "or continue the run in it with checkpoint.resume=auto"
        )
    if resume == "auto" and not (folder / "config.yaml").is_file():
        return (
            f"train.output_dir={folder} is not empty and holds no run (no config.yaml); checkpoint.resume=auto "
            "continues a run in its own folder: choose that one, or a new one"
        )
    return None


def require_trackers(config: RunConfig) -> None:
    """Refuse a tracker whose package is not installed.

    Raises:
        ConfigError: naming the package.
    """
    for name in config.log.report_to:
        if find_spec(TRACKER_PACKAGES[name]) is None:
            package = TRACKER_PACKAGES[name]
            raise ConfigError(
                f"log.report_to={name} needs the package {package}; pip install {package}, or leave it out"
            )


def _is_virtual(folder: Path) -> bool:
    # The super-user may write there by the permissions, and yet nothing can be made. By name, not by the size of the
    # file system: network file systems may report none.
    return any(folder.resolve().is_relative_to(root) for root in ("/proc", "/sys"))
