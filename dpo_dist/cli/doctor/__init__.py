"""`dpo-dist doctor`: whether training can start here, before somebody waits in a queue for it.

    findings.py  what was found, as text and as JSON
    machine.py   cores, memory, limits of the process, compiler
    network.py   interfaces and environment variables
    software.py  packages, accelerators, attention kernels
    folders.py   run folder and cache: writable, shared, locks, room
    inputs.py    models, data and device of a configuration
    meeting.py   what all ranks find out together
    traffic.py   what is measured between them
    agreement.py findings from what they have told
    waiting.py   where they do not answer

Nothing is trained, downloaded or converted, and no file stays. docs/doctor.md has every line.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import typer

from dpo_dist.cli.doctor.findings import Finding, as_json, as_text, exit_code
from dpo_dist.cli.doctor.folders import cache_findings, run_folder_findings
from dpo_dist.cli.doctor.inputs import input_findings
from dpo_dist.cli.doctor.machine import count_of, machine_findings
from dpo_dist.cli.doctor.meeting import Own, meet
from dpo_dist.cli.doctor.network import network_findings
from dpo_dist.cli.doctor.software import software_findings
from dpo_dist.cli.doctor.waiting import Waiting, obstacle
from dpo_dist.cli.logs import set_up_logging
from dpo_dist.cli.redaction import redacted
from dpo_dist.config import RunConfig
from dpo_dist.distributed import launched_rank, process_group

DEFAULT_TIMEOUT = 120  # seconds; a run waits longer, for it has longer things to wait for


def examine_here(config: RunConfig | None, cache_dir: Path, ranks_meet: bool = False) -> list[Finding]:
    """All that this process can see by itself.

    Args:
        config: of the run, if there is one to look at.
        cache_dir: of dpo_dist.
        ranks_meet: what they will find out together is left to that.
    """
    findings = [*software_findings(os.environ), *machine_findings(os.environ), *network_findings(os.environ)]
    findings += cache_findings(cache_dir)
    if config is None:
        return findings
    inputs, num_trained = input_findings(config, os.environ)
    return [*findings, *run_folder_findings(config, os.environ, num_trained, ranks_meet), *inputs]


def run_doctor(config: RunConfig | None, cache_dir: Path, json_wanted: bool) -> int:
    """Examine, print, and return the exit code.

    Args:
        config: of the run, if there is one to look at.
        cache_dir: of dpo_dist.
        json_wanted: one JSON object instead of lines.
    """
    findings = examine_here(config, cache_dir)
    typer.echo(_report(findings, 1, json_wanted))
    return exit_code(findings)


def run_distributed(config: RunConfig | None, mistake: str, cache_dir: Path, json_wanted: bool, timeout: int) -> int:
    """As `run_doctor`, on all ranks together: the first one prints, and all return the same. Collective.

    Args:
        config: of the run, if there is one to look at.
        mistake: what is wrong with this rank's configuration; "" if nothing is.
        cache_dir: of dpo_dist.
        json_wanted: one JSON object instead of lines.
        timeout: seconds that a rank waits for the others at each stage.
    """
    set_up_logging()
    num_ranks = count_of(os.environ, "WORLD_SIZE")
    own = Own(config, mistake, examine_here(config, cache_dir, ranks_meet=True))
    with _kept_output() as print_report:

        def tell(findings: Sequence[Finding]) -> None:
            if launched_rank() == 0:
                print_report(_report(findings, num_ranks, json_wanted))
            elif findings[-1].name == "meeting":  # the first rank may not even be there
                said = f"rank {launched_rank()}: {findings[-1].text}; {findings[-1].way_out}"
                print(redacted(said), file=sys.stderr, flush=True)

        findings = _meet(own, timeout, tell)
        tell(findings)
    return exit_code(findings)


def _meet(own: Own, timeout: int, tell: Callable[[Sequence[Finding]], None]) -> list[Finding]:
    if reason := obstacle(own.findings):
        return [*own.findings, reason]
    findings = own.findings
    ddp_timeout = own.config.parallel.ddp_timeout if own.config else None
    with Waiting(timeout, ddp_timeout, lambda lost: tell([*findings, lost])) as waiting:
        try:
            with process_group(timedelta(seconds=timeout)) as ranks:
                findings = meet(own, ranks, waiting.stage)
        except Exception as error:
            lost = waiting.explain(error)
            if lost is None:
                raise
            findings = [*findings, lost]
    return findings


@contextmanager
def _kept_output() -> Iterator[Callable[[str], None]]:
    """Inside, standard output belongs to the report: what gloo and others write goes to standard error."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)

    def print_report(text: str) -> None:
        with open(os.dup(kept), "w", encoding="utf-8") as output:
            output.write(text + "\n")

    try:
        yield print_report
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _report(findings: Sequence[Finding], num_ranks: int, json_wanted: bool) -> str:
    return as_json(findings, num_ranks) if json_wanted else as_text(findings)
