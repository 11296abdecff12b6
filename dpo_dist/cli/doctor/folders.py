"""Where a run writes: whether it can, on what file system, whether locks work there, and how much room there is."""

import fcntl
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import psutil

from dpo_dist.checkpoint import explain_write_error, free_bytes, human_bytes
from dpo_dist.cli.doctor.findings import Finding
from dpo_dist.cli.doctor.machine import count_of, ranks_here
from dpo_dist.cli.requirements import LOCK_FILE, PROBE, output_in_use, require_possible_output
from dpo_dist.cli.run_folder import checkpoint_bytes
from dpo_dist.config import RunConfig
from dpo_dist.errors import ConfigError

SECTION = "folders"
# Of /proc/filesystems and of FUSE: several machines may have these. What is in neither list can be either.
_SHARED = frozenset(
    "nfs nfs4 lustre gpfs beegfs cifs smb3 ceph 9p afs wekafs panfs pvfs2 orangefs ocfs2 gfs2 virtiofs "
    "fuse.sshfs fuse.glusterfs fuse.juicefs fuse.ceph-fuse fuse.gcsfuse fuse.s3fs fuse.beegfs-mount".split()
)
_LOCAL = frozenset("ext2 ext3 ext4 xfs btrfs zfs f2fs overlay fuseblk vfat".split())
_MEMORY = frozenset("tmpfs ramfs".split())


def existing_parent(folder: Path) -> Path:
    """The folder itself, or the lowest folder above it that is there."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def file_system(folder: Path) -> tuple[str, str]:
    """The type of the file system that a folder is on, or will be, and where that is mounted; "" if nobody knows."""
    place = existing_parent(folder).resolve()
    mounts = [one for one in psutil.disk_partitions(all=True) if place.is_relative_to(one.mountpoint)]
    # Of two at the same place the later one hides the other.
    own = max(enumerate(mounts), key=lambda pair: (len(Path(pair[1].mountpoint).parts), pair[0]), default=None)
    return (own[1].fstype, own[1].mountpoint) if own else ("", "")


def kind_of(file_system_type: str) -> str:
    """`shared`, `local`, `memory` or `unknown`."""
    kinds = {"shared": _SHARED, "local": _LOCAL, "memory": _MEMORY}
    return next((kind for kind, names in kinds.items() if file_system_type in names), "unknown")


def cache_findings(cache: Path) -> list[Finding]:
    """Whether the cache can be written, and how much room it has."""
    try:
        _try_to_write(cache)
    except OSError as error:
        way_out = "set DPO_DIST_CACHE to a folder that can be written"
        return [Finding(SECTION, "cache", f"{cache} cannot be written ({error})", "problem", way_out)]
    return [_room("cache", cache)]


def run_folder_findings(
    config: RunConfig, environment: Mapping[str, str], num_trained: int | None, ranks_meet: bool = False
) -> list[Finding]:
    """What a run's own folder needs; makes no folder that stays.

    Args:
        config: names the folder.
        environment: of this process.
        num_trained: parameters; None where that is not known.
        ranks_meet: they will try whether they share the folder, which its type can only suggest.
    """
    folder = Path(config.train.output_dir).expanduser().absolute()
    if problem := _not_usable(config, folder):
        return [problem]
    has_several_nodes = count_of(environment, "WORLD_SIZE") > ranks_here(environment) and not ranks_meet
    findings = [_room("run folder", folder), _lock(folder), _file_system(folder, has_several_nodes)]
    if num_trained is not None:
        findings.append(_checkpoints(config, folder, num_trained))
    return findings


def _not_usable(config: RunConfig, folder: Path) -> Finding | None:
    """The problem that no run can get past."""
    other = "choose another train.output_dir, or change its owner or mode"
    try:
        require_possible_output(config)
        _try_to_write(folder)
    except ConfigError as error:
        return Finding(SECTION, "run folder", str(error), "problem", other)
    except OSError as error:
        said = explain_write_error(error, existing_parent(folder), 0)
        return Finding(SECTION, "run folder", f"train.output_dir={folder}: {said}", "problem", other)
    if _is_trained_in(folder):
        text = f"train.output_dir={folder}: another run trains in this folder"
        return Finding(SECTION, "run folder", text, "problem", "wait until it has ended, or choose another folder")
    if in_use := output_in_use(config):
        way_out = "choose another train.output_dir, or checkpoint.resume=auto to go on with the run in it"
        return Finding(SECTION, "run folder", in_use, "problem", way_out)
    return None


def _try_to_write(folder: Path) -> None:
    """Write a file where the folder is or will be, down to the disk, and remove it."""
    with tempfile.NamedTemporaryFile(dir=existing_parent(folder), prefix=PROBE) as file:
        file.write(b"dpo_dist" * 512)
        file.flush()
        os.fsync(file.fileno())


def _is_trained_in(folder: Path) -> bool:
    try:
        descriptor = os.open(folder / LOCK_FILE, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def _lock(folder: Path) -> Finding:
    """Whether two runs would hear of each other: a lock that is held refuses a second one."""
    with tempfile.NamedTemporaryFile(dir=existing_parent(folder), prefix=PROBE) as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with open(held.name, "rb") as second:
                fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return Finding(SECTION, "locks", "flock works in the run folder")
        except OSError as error:
            return _no_locks(f"flock does not work in the run folder ({error})")
    return _no_locks("flock in the run folder lets two processes in at once")


def _no_locks(text: str) -> Finding:
    way_out = "start only one run in a folder: nothing can keep a second one out; on NFS or Lustre, mount with flock"
    return Finding(SECTION, "locks", text, "warning", way_out)


def _file_system(folder: Path, has_several_nodes: bool) -> Finding:
    fstype, mountpoint = file_system(folder)
    kind = kind_of(fstype)
    text = f"{fstype or 'unknown type'}, mounted at {mountpoint or '?'}: {kind}"
    values = {"type": fstype, "mounted_at": mountpoint, "kind": kind}
    if kind in ("local", "memory") and has_several_nodes:
        way_out = "choose a train.output_dir on a file system that all nodes share: every rank writes its shards there"
        return Finding(
            SECTION, "file system", f"{text}, and the ranks are on several nodes", "problem", way_out, values
        )
    if kind == "memory":
        way_out = "choose a train.output_dir on a disk: this one is lost with the machine, and takes its memory"
        return Finding(SECTION, "file system", text, "warning", way_out, values)
    if fstype == "overlay":
        way_out = "mount a volume for train.output_dir, if this is a container: its own files go with it"
        return Finding(SECTION, "file system", text, "warning", way_out, values)
    return Finding(SECTION, "file system", text, values=values)


def _room(name: str, folder: Path) -> Finding:
    free = free_bytes(existing_parent(folder))
    fstype, _ = file_system(folder)
    values = {"folder": str(folder), "free_bytes": free, "file_system": fstype, "exists": folder.exists()}
    is_new = "" if folder.exists() else ", not made yet"
    return Finding(SECTION, name, f"{folder}{is_new}: can be written, {human_bytes(free)} free", values=values)


def _checkpoints(config: RunConfig, folder: Path, num_trained: int) -> Finding:
    """As `require_space` at the start of a run, without waiting for one."""
    free = free_bytes(existing_parent(folder))
    estimate = checkpoint_bytes(num_trained, config.model.dtype == "float32")
    said = f"a checkpoint takes about {human_bytes(estimate)}, and {human_bytes(free)} are free"
    values = {"checkpoint_bytes": estimate, "free_bytes": free, "parameters": num_trained}
    way_out = "free some space, or choose another train.output_dir"
    if free < estimate:
        return Finding(SECTION, "checkpoints", said, "problem", way_out, values)
    if free < 2 * estimate:  # the older one stays until its successor is written
        way_out += "; checkpoint.save_total_limit=1 leaves only the newest, once it is written"
        return Finding(SECTION, "checkpoints", f"{said}: a second one does not fit", "warning", way_out, values)
    return Finding(SECTION, "checkpoints", said, values=values)
