"""Findings from what all ranks have told: who is where, what differs, how fast and how far apart they are."""

from collections.abc import Mapping, Sequence
from typing import Any

from dpo_dist.checkpoint import human_bytes
from dpo_dist.cli.doctor.findings import Finding, Status, describe_ranks
from dpo_dist.cli.doctor.traffic import REPEATS, bandwidths, clock_offset

SECTION = "ranks"
_FAR_APART = 1.0  # seconds between clocks; times of files and lines of logs are then out of order
_SHOWN = 4  # differences that a line names


def place_finding(everybody: Sequence[Mapping[str, Any]]) -> Finding:
    """Which ranks are on which machine."""
    machines: dict[str, list[int]] = {}
    for rank, theirs in enumerate(everybody):
        machines.setdefault(theirs["machine"], []).append(rank)
    shown = [
        f"{describe_ranks(ranks)} on {', '.join(sorted({everybody[rank]['host'] for rank in ranks}))}"
        for ranks in machines.values()
    ]
    values = {"hosts": [theirs["host"] for theirs in everybody], "machines": list(machines.values())}
    text = f"{len(machines)}: {'; '.join(shown)}"
    if len(everybody) == 1:
        way_out = "start it as the run will be, such as torchrun --nproc-per-node 8 -m dpo_dist doctor --distributed"
        return Finding(SECTION, "machines", f"{text}; nobody to compare with", "warning", way_out, values)
    return Finding(SECTION, "machines", text, values=values)


def differences(everybody: Sequence[Mapping[str, str]]) -> list[tuple[str, dict[str, list[int]]]]:
    """Facts that are not the same on all ranks, each with the ranks of every value.

    Args:
        everybody: facts of every rank; one that a rank lacks counts as "nothing".
    """
    found = []
    for what in dict.fromkeys(name for theirs in everybody for name in theirs):
        ranks: dict[str, list[int]] = {}
        for rank, theirs in enumerate(everybody):
            ranks.setdefault(theirs.get(what) or "nothing", []).append(rank)
        if len(ranks) > 1:
            found.append((what, ranks))
    return found


def package_finding(everybody: Sequence[Mapping[str, Any]]) -> Finding:
    """Whether all ranks have the same packages: they would not compute the same."""
    way_out = "install the same versions everywhere (pip install -c constraints.txt .), or use one image"
    return _agreement("packages", [theirs["packages"] for theirs in everybody], way_out)


def variable_finding(everybody: Sequence[Mapping[str, Any]]) -> Finding:
    """Whether NCCL and gloo are told the same everywhere; names of interfaces may well differ."""
    way_out = "export the same values on all machines, unless they differ on purpose"
    return _agreement("variables of NCCL", [theirs["variables"] for theirs in everybody], way_out, "warning")


def setting_finding(everybody: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Whether all ranks have the same configuration; nothing if no rank has one."""
    if not any(theirs["settings"] or theirs["mistake"] for theirs in everybody):
        return []
    mistakes: dict[str, list[int]] = {}
    for rank, theirs in enumerate(everybody):
        if theirs["mistake"]:
            mistakes.setdefault(theirs["mistake"], []).append(rank)
    if mistakes:
        return [
            Finding(SECTION, "configuration", text, "problem", "correct the configuration of these ranks", ranks=(*of,))
            for text, of in mistakes.items()
        ]
    facts = [{**theirs["settings"], "the run folder": theirs["folder"]} for theirs in everybody]
    return [_agreement("configuration", facts, "start every rank with the same file and the same overrides")]


def _agreement(name: str, everybody: Sequence[Mapping[str, str]], way_out: str, status: Status = "problem") -> Finding:
    found = differences(everybody)
    if not found:
        return Finding(SECTION, name, f"the same on all {len(everybody)} ranks")
    shown = [
        f"{what}: " + ", ".join(f"{value} on {describe_ranks(ranks)}" for value, ranks in by_value.items())
        for what, by_value in found[:_SHOWN]
    ]
    shown += [f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
    values = {"differences": dict(found)}
    return Finding(SECTION, name, f"differs between ranks: {'; '.join(shown)}", status, way_out, values)


def clock_finding(moments: Sequence[Sequence[Sequence[float]]]) -> Finding:
    """How far the clocks are apart, as closely as that can be known."""
    offsets = [clock_offset(moments[0], theirs) for theirs in moments]
    largest = max(range(len(offsets)), key=lambda rank: abs(offsets[rank][0]))
    offset, resolution = offsets[largest]
    values = {
        "offsets_seconds": [one for one, _ in offsets],
        "resolutions_seconds": [uncertain for _, uncertain in offsets],
    }
    text = f"rank {largest} is {1000 * offset:+.3f} ms from rank 0 (known to {1000 * resolution:.3f} ms)"
    if len(moments) == 1:
        text = "there is one rank"
    if abs(offset) - resolution > _FAR_APART:
        return Finding(SECTION, "clocks", text, "warning", "synchronise the machines' clocks (chrony, ntpd)", values)
    return Finding(SECTION, "clocks", text, values=values)


def bandwidth_findings(times: Sequence[Mapping[str, Mapping[str, Any]]]) -> list[Finding]:
    """A line for each size: what the slowest rank measured, and whether all sums were right."""
    findings = []
    for size in times[0]:
        seconds = max(theirs[size]["seconds"] for theirs in times)
        algorithm, bus = bandwidths(int(size), seconds, len(times))
        name = f"all-reduce {human_bytes(int(size))}"
        text = f"{1e6 * seconds:.0f} us; algorithm {_rate(algorithm)}, bus {_rate(bus)} (median of {REPEATS})"
        values = {
            "bytes": int(size),
            "seconds": seconds,
            "algorithm_bytes_per_second": algorithm,
            "bus_bytes_per_second": bus,
        }
        wrong = [rank for rank, theirs in enumerate(times) if not theirs[size]["is_right"]]
        if wrong:
            way_out = "do not train on this network: run the tests of NCCL and of the hardware on these machines"
            text = f"the sum is wrong on {describe_ranks(wrong)}"
            findings.append(Finding(SECTION, name, text, "problem", way_out, values))
        else:
            findings.append(Finding(SECTION, name, text, values=values))
    return findings


def _rate(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e9:.3f} GB/s"


def file_findings(
    errors: Mapping[int, str], unseen: Sequence[set[int]], looks: Sequence[Mapping[str, Any]]
) -> list[Finding]:
    """Whether what one rank writes beside the run's folder can be read by all.

    Args:
        errors: why ranks could not write.
        unseen: for every rank, the ranks whose files it did not find.
        looks: what every rank told of its search.
    """
    findings = [
        Finding(SECTION, "shared folder", f"cannot write ({text})", "problem", _SHARE, ranks=(rank,))
        for rank, text in errors.items()
    ]
    by_unseen: dict[tuple[int, ...], list[int]] = {}
    for rank, others in enumerate(unseen):
        by_unseen.setdefault(tuple(sorted(others)), []).append(rank)
    for others, ranks in by_unseen.items():
        if others:
            text = f"files that {describe_ranks(others)} wrote are not seen"
            findings.append(Finding(SECTION, "shared folder", text, "problem", _SHARE, ranks=tuple(ranks)))
    if findings:
        return findings
    slowest = max(theirs["seconds"] for theirs in looks)
    text = f"every rank wrote a file beside the run folder, and all saw it within {slowest:.2f} s"
    return [Finding(SECTION, "shared folder", text, values={"seconds": [theirs["seconds"] for theirs in looks]})]


_SHARE = "train.output_dir must be on a file system that all nodes share, and writable on each of them"


def free_space_finding(everybody: Sequence[Mapping[str, Any]]) -> Finding:
    """How much every rank sees free; of one shared file system all see the same."""
    known = {rank: theirs["free_bytes"] for rank, theirs in enumerate(everybody) if theirs["free_bytes"] is not None}
    values = {"free_bytes": [theirs["free_bytes"] for theirs in everybody]}
    least = min(known, key=lambda rank: known[rank], default=None)
    text = f"at least {human_bytes(known[least])} (rank {least})" if least is not None else "nobody knows"
    status: Status = "ok" if least is not None else "warning"
    return Finding(SECTION, "free space", text, status, "" if status == "ok" else _SHARE, values)
