"""Jobs of `launch/slurm.sbatch` on a real Slurm: whatever interrupts one, it ends with the numbers of one run."""

import csv
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.machines import NAMES, two_machines, until
from tests.cluster.runs import STEPS, compare, compare_nearly, environment, reference_run, write_config
from tests.cluster.slurm import Slurm, slurm_on
from tests.launching import REPOSITORY

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
SCRIPT = REPOSITORY / "launch/slurm.sbatch"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    folder = tmp_path_factory.mktemp("slurm")
    with two_machines(folder) as machines, slurm_on(machines, folder) as commands:
        yield commands


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference_run(tmp_path_factory.mktemp("undisturbed"))


def submit(slurm: Slurm, folder: Path, *options: str, seconds_per_step: float = 0.3, **more: str) -> str:
    """The number of a job that trains in `folder/out`."""
    write_config(folder)
    until(lambda: slurm("sinfo", "-h", "-o", "%t", "-p", "low") == "idle", 60, "both machines are idle")
    variables = environment(seconds_per_step) | {"LAUNCH_FOLDER": str(SCRIPT.parent), "NPROC": "1"} | more
    command = ("sbatch", "--parsable", "--nodes=2", *options, str(SCRIPT), "run.yaml", str(folder / "out"))
    return slurm(*command, cwd=folder, **variables)


def step_of(folder: Path) -> int:
    path = folder / "out/metrics.jsonl"
    written = path.read_text().splitlines() if path.is_file() else []
    return json.loads(written[-1])["step"] if written else 0


def ends_well(slurm: Slurm, job: str, folder: Path, restarts: int) -> None:
    """The job ends, after so many restarts, and is not queued again."""
    until(lambda: slurm.job(job)["JobState"] in ("COMPLETED", "FAILED"), 300, log_of(folder, job))
    known = slurm.job(job)
    assert known["JobState"] == "COMPLETED", log_of(folder, job)
    assert int(known["Restarts"]) == restarts, log_of(folder, job)


def log_of(folder: Path, job: str) -> str:
    path = folder / f"dpo_dist-{job}.log"
    return path.read_text() if path.is_file() else "no log"


def test_the_time_limit_is_near(slurm: Slurm, undisturbed: Path, tmp_path: Path) -> None:
    """Slurm may send the signal a minute early: 30 to 90 s after the start of a job of two minutes."""
    job = submit(slurm, tmp_path, "--time=2", "--signal=B:USR1@30", seconds_per_step=1.0)
    until(lambda: int(slurm.job(job)["Restarts"]) == 1, 240, "queued again")
    assert "the time limit is near: stopping after this step" in log_of(tmp_path, job)
    ends_well(slurm, job, tmp_path, restarts=1 if step_of(tmp_path) else 2)
    compare(undisturbed, tmp_path)


def test_a_signal_by_hand(slurm: Slurm, undisturbed: Path, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path)
    until(lambda: step_of(tmp_path) >= 12, 120, log_of(tmp_path, job))
    slurm("scancel", "--batch", "--signal=USR1", job)
    ends_well(slurm, job, tmp_path, restarts=1)
    compare(undisturbed, tmp_path)


def test_srun_starts_the_ranks(slurm: Slurm, undisturbed: Path, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, LAUNCHER="srun")
    until(lambda: step_of(tmp_path) >= 12, 120, log_of(tmp_path, job))
    slurm("scancel", "--batch", "--signal=USR1", job)
    ends_well(slurm, job, tmp_path, restarts=1)
    compare(undisturbed, tmp_path)


def test_two_ranks_on_one_node_by_srun(slurm: Slurm, undisturbed: Path, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, "--nodes=1", "--ntasks-per-node=2", seconds_per_step=0.0, LAUNCHER="srun", NPROC="2")
    ends_well(slurm, job, tmp_path, restarts=0)
    compare(undisturbed, tmp_path)


def test_a_job_of_higher_priority(slurm: Slurm, undisturbed: Path, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path)
    until(lambda: step_of(tmp_path) >= 12, 120, log_of(tmp_path, job))
    slurm("sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--wrap=sleep 1", cwd=tmp_path)
    ends_well(slurm, job, tmp_path, restarts=1)
    assert "preempted or cancelled" in log_of(tmp_path, job)
    compare(undisturbed, tmp_path)


def test_a_machine_fails_and_fewer_come_back(slurm: Slurm, undisturbed: Path, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path)
    until(lambda: step_of(tmp_path) >= 12, 120, log_of(tmp_path, job))
    slurm("scontrol", "update", f"nodename={NAMES[1]}", "state=down", "reason=test")
    try:
        until(lambda: slurm.job(job)["Restarts"] == "1" and slurm.job(job)["JobState"] == "PENDING", 60, "queued again")
        slurm("scontrol", "update", f"jobid={job}", "numnodes=1", "numtasks=1", "numcpus=1")  # better than none
        ends_well(slurm, job, tmp_path, restarts=1)
    finally:
        slurm("scontrol", "update", f"nodename={NAMES[1]}", "state=resume")
    said = log_of(tmp_path, job)
    assert "was saved by 2 processes at ZeRO stage 3 and goes on with 1 process at ZeRO stage 3" in said
    (saved,) = re.findall(r"resuming after step (\d+)", said)
    compare_nearly(undisturbed, tmp_path, int(saved))


def test_a_sweep(slurm: Slurm, tmp_path: Path) -> None:
    """Two runs that share the scores of one reference."""
    write_config(tmp_path)
    (tmp_path / "lines").write_text("loss.beta=0.1\nloss.beta=0.3 train.max_steps=5\n")
    variables = environment() | {"NPROC": "1", "SBATCH_OPTIONS": "--nodes=1", "DPO_DIST_CACHE": str(tmp_path / "cache")}
    said = slurm("bash", str(SCRIPT.parent / "sweep.sh"), "run.yaml", "sweep", "lines", cwd=tmp_path, **variables)
    job = said.split()[1].rstrip(":")
    until(
        lambda: slurm("squeue", "-h", "-t", "all", "-r", "-o", "%T", "-j", job).split() == 2 * ["COMPLETED"], 240, said
    )
    logs = [path.read_text() for path in sorted(tmp_path.glob("dpo_dist-*_*.log"))]
    assert len(logs) == 2 and all(re.search(r"reference: cache: .*all \d+ values are in", log) for log in logs)
    done = subprocess.run(["dpo-dist", "compare", "sweep", "--csv"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(done.stdout.splitlines()))
    assert {(row["loss.beta"], row["state"], row["step"]) for row in rows} == {
        ("0.1", "finished", str(STEPS)),
        ("0.3", "finished", "5"),
    }
