"""`dpo-dist doctor`: whether training can start here, before somebody waits in a queue for it.

    findings.py  what was found, as text and as JSON
    machine.py   cores, memory, limits of the process, compiler
    network.py   interfaces and environment variables
    software.py  packages, accelerators, attention kernels
    folders.py   run folder and cache: writable, shared, locks, room
    inputs.py    models, data and device of a configuration

Nothing is trained, downloaded or converted, and no file stays. docs/doctor.md has every line.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import typer

from dpo_dist.cli.doctor.findings import Finding, as_json, as_text, exit_code
from dpo_dist.cli.doctor.folders import cache_findings, run_folder_findings
from dpo_dist.cli.doctor.inputs import input_findings
from dpo_dist.cli.doctor.machine import machine_findings
from dpo_dist.cli.doctor.network import network_findings
from dpo_dist.cli.doctor.software import software_findings
from dpo_dist.config import RunConfig


def examine_here(config: RunConfig | None, cache_dir: Path) -> list[Finding]:
    """All that this process can see by itself.

    Args:
        config: of the run, if there is one to look at.
        cache_dir: of dpo_dist.
    """
    findings = [*software_findings(os.environ), *machine_findings(os.environ), *network_findings(os.environ)]
    findings += cache_findings(cache_dir)
    if config is None:
        return findings
    inputs, num_trained = input_findings(config, os.environ)
    return [*findings, *run_folder_findings(config, os.environ, num_trained), *inputs]


def run_doctor(config: RunConfig | None, cache_dir: Path, json_wanted: bool) -> int:
    """Examine, print, and return the exit code.

    Args:
        config: of the run, if there is one to look at.
        cache_dir: of dpo_dist.
        json_wanted: one JSON object instead of lines.
    """
    findings = examine_here(config, cache_dir)
    _print(findings, 1, json_wanted)
    return exit_code(findings)


def _print(findings: Iterable[Finding], num_ranks: int, json_wanted: bool) -> None:
    listed = list(findings)
    typer.echo(as_json(listed, num_ranks) if json_wanted else as_text(listed))
