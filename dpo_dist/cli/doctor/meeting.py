"""What ranks find out together: one group, few collectives, the same findings on every rank.

1. every rank's facts: packages, settings, machine, what it found by itself
2. all-reduces of nothing, which bound the clocks, and of rising sizes, which are timed
3. a file of every rank in the run's folder: written, seen by all, removed
"""

import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_dist.checkpoint import free_bytes
from dpo_dist.cli.describe import settings_of
from dpo_dist.cli.doctor.agreement import (
    bandwidth_findings,
    clock_finding,
    file_findings,
    free_space_finding,
    package_finding,
    place_finding,
    setting_finding,
    variable_finding,
)
from dpo_dist.cli.doctor.findings import Finding, as_finding, merged
from dpo_dist.cli.doctor.folders import existing_parent
from dpo_dist.cli.doctor.network import traffic_variables
from dpo_dist.cli.doctor.software import installed_versions
from dpo_dist.cli.doctor.traffic import time_all_reduces, time_barriers
from dpo_dist.cli.requirements import PROBE
from dpo_dist.config import RunConfig
from dpo_dist.distributed import Ranks, all_gather_json

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
LONGEST_WAIT = 15.0  # seconds for a file of another machine: network file systems remember what was not there
_POLL = 0.05  # seconds


@dataclass(frozen=True)
class Own:
    """What this rank knows before it meets the others."""

    config: RunConfig | None
    mistake: str
    """What is wrong with this rank's configuration; "" if nothing is."""
    findings: list[Finding]


def meet(own: Own, ranks: Ranks, stage: Callable[[str], None]) -> list[Finding]:
    """Findings of all ranks, the same on each. Collective.

    Args:
        own: of this rank.
        ranks: where it stands.
        stage: told what is begun, so that whoever waits in vain can say for what.
    """
    stage("comparing packages and settings")
    everybody = all_gather_json(_facts(own))
    findings = merged([[as_finding(one) for one in theirs["findings"]] for theirs in everybody])
    findings += [place_finding(everybody), package_finding(everybody), variable_finding(everybody)]
    findings += setting_finding(everybody)
    stage("comparing clocks")
    moments = time_barriers()
    stage("timing all-reduces")
    times = time_all_reduces(ranks.device)
    has_folders = all(theirs["folder"] for theirs in everybody)
    stage("writing a file of every rank into the run folder")
    with _Probe(own.config if has_folders else None, ranks.rank, everybody[0]["token"]) as probe:
        measured = all_gather_json({"moments": moments, "times": times, "error": probe.error})
        findings += [clock_finding([theirs["moments"] for theirs in measured])]
        findings += bandwidth_findings([theirs["times"] for theirs in measured])
        if has_folders:
            written = [rank for rank, theirs in enumerate(measured) if not theirs["error"]]
            stage("looking for the files of the others")
            seen = all_gather_json(probe.look(written))
            errors = {rank: theirs["error"] for rank, theirs in enumerate(measured) if theirs["error"]}
            findings += file_findings(errors, [set(written) - set(theirs["seen"]) for theirs in seen], seen)
            findings += [free_space_finding(everybody)]
    return findings


def _facts(own: Own) -> dict[str, Any]:
    folder = Path(own.config.train.output_dir).expanduser().absolute() if own.config else None
    free = None
    with suppress(OSError, StopIteration):
        free = free_bytes(existing_parent(folder)) if folder else None
    return {
        "host": socket.gethostname(),
        # Two containers of one machine may have two names, and two machines may have the same.
        "machine": _BOOT_ID.read_text().strip() if _BOOT_ID.is_file() else socket.gethostname(),
        "packages": installed_versions(),
        "variables": traffic_variables(os.environ),
        "settings": settings_of(own.config) if own.config else {},
        "mistake": own.mistake,
        "folder": str(folder) if folder else "",
        "free_bytes": free,
        "findings": [{**vars(finding), "ranks": list(finding.ranks)} for finding in own.findings],
        "token": os.urandom(8).hex(),
    }


class _Probe:
    """A file of this rank beside the run's folder, or in it; gone afterwards, however that ends."""

    def __init__(self, config: RunConfig | None, rank: int, token: str) -> None:
        self.error = ""
        self._rank, self._folder = rank, None
        if config is not None:
            self._folder = existing_parent(Path(config.train.output_dir).expanduser()) / f"{PROBE}{token}"

    def __enter__(self) -> "_Probe":
        if self._folder is not None:
            try:
                self._folder.mkdir(exist_ok=True, mode=0o700)
                with (self._folder / f"rank-{self._rank}").open("w") as file:
                    file.write(str(self._rank))
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                self.error = str(error)
        return self

    def look(self, written: list[int]) -> dict[str, Any]:
        """Ranks whose files are here, and the seconds until all were."""
        started, wanted = time.monotonic(), set(written)
        seen: set[int] = set()
        while time.monotonic() - started < LONGEST_WAIT:
            seen = wanted & self._visible()
            # One file is read as well: a name may be here before what is in it.
            if seen == wanted and all(self._holds(rank) for rank in wanted if rank == self._neighbour(written)):
                break
            time.sleep(_POLL)
        return {"seen": sorted(seen), "seconds": time.monotonic() - started}

    def _visible(self) -> set[int]:
        if self._folder is None or not self._folder.is_dir():
            return set()
        return {int(path.name.removeprefix("rank-")) for path in self._folder.glob("rank-*")}

    def _neighbour(self, written: list[int]) -> int:
        return next((rank for rank in written if rank > self._rank), min(written))

    def _holds(self, rank: int) -> bool:
        try:
            return self._folder is not None and (self._folder / f"rank-{rank}").read_text() == str(rank)
        except OSError:
            return False

    def __exit__(self, *_: object) -> None:
        if self._folder is not None:
            with suppress(OSError):  # the last rank on a file system finds the folder empty
                (self._folder / f"rank-{self._rank}").unlink(missing_ok=True)
                self._folder.rmdir()
