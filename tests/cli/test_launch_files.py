"""The scripts of `launch/` for one machine, many, and Slurm, with stand-ins for what they call."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.launching import REPOSITORY

LAUNCH = REPOSITORY / "launch"
# What each attempt does in the place of srun: OUT is the folder of the run.
SAVES = 'mkdir -p "$OUT/checkpoints"; echo step-000002 > "$OUT/checkpoints/latest"; '
FINISHES = SAVES + 'mkdir -p "$OUT/model"; sleep 0.1; echo {} > "$OUT/model/dpo_dist.json"; '
WAITS = 'trap "exit 1" USR1 TERM; for _ in $(seq 300); do sleep 0.1; done; '


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A folder of stand-ins, each of which writes down how it was called."""
    programs = {
        "torchrun": "",
        "deepspeed": "",
        "nvidia-smi": "exit 9",
        "scancel": 'kill -USR1 "$(cat "$CALLS/srun.pid")"',
        "scontrol": '[ "$1" != show ] || printf "n0\\nn1\\n"',
        "sleep": 'case $1 in 60) ;; *) exec /bin/sleep "$@" ;; esac',
        "srun": 'echo $$ > "$CALLS/srun.pid"; eval "$ATTEMPT"',
    }
    (tmp_path / "bin").mkdir()
    for name, does in programs.items():
        path = tmp_path / "bin" / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >> "$CALLS/calls"\n{does}\n')
        path.chmod(0o755)
    (tmp_path / "out").mkdir()
    return tmp_path


def run(
    machine: Path, script: str, *arguments: str, stop: signal.Signals | None = None, **variables: str
) -> tuple[int, str, list[str]]:
    """Exit code, output, and the calls of other programs."""
    (machine / "calls").unlink(missing_ok=True)
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMP_", "DS_", "CUDA_"))
    }
    env = inherited | {"PATH": f"{machine / 'bin'}:{os.environ['PATH']}", "CALLS": str(machine), **variables}
    process = subprocess.Popen(
        ["bash", str(LAUNCH / script), *arguments],
        env=env,
        cwd=machine,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if stop is not None:
        deadline = time.monotonic() + 30
        while not (machine / "srun.pid").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(stop)
    said, _ = process.communicate(timeout=60)
    calls = machine / "calls"
    return process.returncode, said, calls.read_text().splitlines() if calls.exists() else []


# ---- srun


def test_one_rank_of_srun(machine: Path) -> None:
    path = machine / "bin/python"
    shown = 'env | grep -E "^(RANK|LOCAL|WORLD|MASTER|OMP)" | LC_ALL=C sort >> "$CALLS/calls"'
    path.write_text(f'#!/bin/bash\n{shown}\necho "$*" >> "$CALLS/calls"\n')
    path.chmod(0o755)
    slurm = {"SLURM_PROCID": "11", "SLURM_NTASKS": "32", "SLURM_LOCALID": "3", "SLURM_STEP_TASKS_PER_NODE": "8(x4)"}
    code, _, calls = run(machine, "srun.sh", "run.yaml", "a.b=c", HEAD="n0:29501", **slurm)
    assert code == 0 and calls == [
        "LOCAL_RANK=3",
        "LOCAL_WORLD_SIZE=8",
        "MASTER_ADDR=n0",
        "MASTER_PORT=29501",
        "OMP_NUM_THREADS=1",
        "RANK=11",
        "WORLD_SIZE=32",
        "-m dpo_dist train run.yaml a.b=c",
    ]
    assert run(machine, "srun.sh", "run.yaml", HEAD="n0:29501")[0] != 0
    assert run(machine, "srun.sh", "run.yaml", **slurm)[0] != 0


@pytest.mark.parametrize(
    ("launcher", "tasks", "script"),
    [("", "--ntasks=2 --ntasks-per-node=1", "torchrun"), ("srun", "--ntasks=16", "srun")],
)
def test_who_starts_the_ranks_on_slurm(machine: Path, launcher: str, tasks: str, script: str) -> None:
    variables = {"SLURM_JOB_ID": "17", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[0-1]", "NPROC": "8"}
    variables |= {"LAUNCH_FOLDER": str(LAUNCH), "ATTEMPT": SAVES, "OUT": "out"}
    variables |= {"LAUNCHER": launcher} if launcher else {}
    code, _, calls = run(machine, "slurm.sbatch", "run.yaml", "out", **variables)
    started = "\n".join(calls)
    assert code == 0 and tasks in started and f"{LAUNCH}/{script}.sh run.yaml train.output_dir=out" in started
    code, said, _ = run(machine, "slurm.sbatch", "run.yaml", "out", **variables | {"LAUNCHER": "mpirun"})
    assert code == 2 and "LAUNCHER=mpirun is neither torchrun nor srun" in said


# ---- torchrun


def test_one_machine(machine: Path) -> None:
    code, _, calls = run(machine, "torchrun.sh", "run.yaml", "loss.beta=0.2", "a.b=c d")
    (call,) = [call for call in calls if call.startswith("torchrun ")]
    assert code == 0 and call.endswith("-m dpo_dist train run.yaml loss.beta=0.2 a.b=c d")
    assert "--nnodes 1 --nproc-per-node 1 " in call and "store_type=file" in call
    assert "SIGUSR1" in call and "--shutdown-timeout 600" in call


def test_many_machines(machine: Path) -> None:
    variables = {"NNODES": "4", "NPROC": "8", "HEAD": "node0", "STOP_SECONDS": "77"}
    code, _, calls = run(machine, "torchrun.sh", "run.yaml", **variables)
    (call,) = [call for call in calls if call.startswith("torchrun ")]
    assert code == 0 and "--nnodes 4 --nproc-per-node 8 " in call and "--shutdown-timeout 77" in call
    assert "--rdzv-endpoint node0:29500 --rdzv-id dpo_dist " in call and "store_type" not in call
    code, said, calls = run(machine, "torchrun.sh", "run.yaml", NNODES="2")
    assert code and "HEAD names the machine where all of them meet" in said and not calls[1:]


@pytest.mark.parametrize(
    ("shown", "listed", "processes"),
    [
        (None, "echo GPU 0: x; echo '  MIG y'; echo GPU 1: x", 2),
        (None, "echo it has failed; exit 9", 1),
        ("0,3,5", "", 3),
        ("", "echo GPU 0: x; echo GPU 1: x", 1),
    ],
)
def test_processes_are_the_visible_gpus(machine: Path, shown: str | None, listed: str, processes: int) -> None:
    (machine / "bin" / "nvidia-smi").write_text(f"#!/bin/bash\n{listed}\n")
    variables = {} if shown is None else {"CUDA_VISIBLE_DEVICES": shown}
    assert f"--nproc-per-node {processes} " in run(machine, "torchrun.sh", "run.yaml", **variables)[2][-1]
    # By --num_gpus the deepspeed launcher would take the first ones of the machine.
    option = f"--include localhost:{shown}" if shown else f"--num_gpus {processes}"
    assert f" {option} --master_port " in run(machine, "deepspeed.sh", "run.yaml", **variables)[2][-1]


@pytest.mark.parametrize(("script", "by"), [("torchrun.sh", "torchrun"), ("deepspeed.sh", "DeepSpeed's launcher")])
def test_it_says_how_it_is_used(machine: Path, script: str, by: str) -> None:
    code, said, calls = run(machine, script)
    assert code == 0 and said.startswith(f"Train on one machine or many with {by}: launch/{script} CONFIG ")
    assert not calls


# ---- the deepspeed launcher


def test_deepspeed_on_one_machine(machine: Path) -> None:
    code, _, calls = run(machine, "deepspeed.sh", "run.yaml", "loss.beta=0.2", NPROC="2", MASTER_PORT="77")
    assert code == 0 and calls[-1] == (
        "deepspeed --num_gpus 2 --master_port 77 --module dpo_dist train run.yaml loss.beta=0.2"
    )
    (machine / "bin" / "deepspeed").write_text('#!/bin/bash\necho "$DS_ACCELERATOR $OMP_NUM_THREADS"\n')
    assert run(machine, "deepspeed.sh", "run.yaml")[1] == "cpu 1\n"
    assert run(machine, "deepspeed.sh", "run.yaml", CUDA_VISIBLE_DEVICES="0", OMP_NUM_THREADS="3")[1] == " 3\n"


def test_deepspeed_on_many_machines(machine: Path) -> None:
    several = {"NNODES": "2", "NPROC": "8", "HOSTFILE": "hosts", "HEAD": "n0", "NODE_RANK": "1"}
    code, said, calls = run(machine, "deepspeed.sh", "run.yaml", **several)
    assert code == 0 and calls[-1] == (
        "deepspeed --hostfile hosts --num_nodes 2 --num_gpus 8 --no_ssh --node_rank 1 --master_addr n0 "
        "--master_port 29500 --module dpo_dist train run.yaml"
    ), said
    assert (
        "--master_addr n0 --master_port 77 "
        in run(machine, "deepspeed.sh", "run.yaml", **{**several, "HEAD": "n0:77"})[2][-1]
    )
    for shown, right in (("0,1,2,3,4,5,6,7", True), ("1,2,3,4,5,6,7,8", False)):
        code, said, calls = run(machine, "deepspeed.sh", "run.yaml", **several, CUDA_VISIBLE_DEVICES=shown)
        assert (code == 0) == right == any("deepspeed" in call for call in calls)
        assert right or f"CUDA_VISIBLE_DEVICES={shown} is not read" in said
    code, said, calls = run(machine, "deepspeed.sh", "run.yaml", NPROC="2", CUDA_VISIBLE_DEVICES="3,4,5")
    assert " --include localhost:3,4 " in calls[-1]
    code, said, calls = run(machine, "deepspeed.sh", "run.yaml", NPROC="4", CUDA_VISIBLE_DEVICES="3,4,5")
    assert code == 2 and not calls and "NPROC=4 is more than the 3 GPUs" in said
    for name in ("HOSTFILE", "HEAD", "NODE_RANK"):
        code, said, calls = run(machine, "deepspeed.sh", "run.yaml", **{k: v for k, v in several.items() if k != name})
        assert code and f"with NNODES=2, {name}" in said and not any(call.startswith("deepspeed") for call in calls)


# ---- Slurm


def attempt(machine: Path, does: str, number: int = 0, **more: object) -> tuple[int, str, list[str]]:
    variables = {
        "SLURM_JOB_ID": "20007",
        "SLURM_RESTART_COUNT": str(number),
        "SLURM_JOB_NODELIST": "n[0-1]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_SUBMIT_DIR": str(machine),
        "ATTEMPT": does,
        "OUT": str(machine / "out"),
    }
    stop = more.pop("stop", None)
    assert stop is None or isinstance(stop, signal.Signals)
    config = str(more.pop("config", "run.yaml"))
    variables |= {name: str(value) for name, value in more.items()}
    return run(machine, "slurm.sbatch", config, str(machine / "out"), "loss.beta=0.2", stop=stop, **variables)


def requeued(calls: list[str]) -> bool:
    return "scontrol requeue 20007" in calls


def test_what_runs_on_the_nodes(machine: Path) -> None:
    shown = 'echo "$NNODES $HEAD $RUN_ID $STOP_SECONDS ${NPROC:-none}"'
    code, said, calls = attempt(machine, FINISHES + shown, number=3, SLURM_GPUS_ON_NODE=8)
    assert code == 0 and "2 n0:20007 20007.3 240 8" in said, said
    end = f"launch/torchrun.sh run.yaml train.output_dir={machine}/out checkpoint.resume=auto loss.beta=0.2"
    assert any(call.endswith(end) for call in calls)
    assert "none" in attempt(machine, FINISHES + shown)[1]


def test_a_finished_job_is_not_queued_again(machine: Path) -> None:
    code, said, calls = attempt(machine, FINISHES)
    assert code == 0 and not requeued(calls) and "finished; the model is in" in said
    code, said, calls = attempt(machine, "exit 0")  # nothing was left to do
    assert code == 0 and not requeued(calls)
    # Asked to stop when it had just finished.
    code, said, calls = attempt(machine, FINISHES + WAITS, stop=signal.SIGUSR1)
    assert code == 0 and not requeued(calls) and "finished" in said


def test_a_time_limit(machine: Path) -> None:
    code, said, calls = attempt(machine, SAVES + WAITS, stop=signal.SIGUSR1)
    assert code and "scancel --signal=USR1 20007" in calls and requeued(calls)
    assert "the time limit is near; saved: step-000002; queued again" in said


def test_a_preemption(machine: Path) -> None:
    code, said, calls = attempt(machine, SAVES + "/bin/sleep 2; exit 1", stop=signal.SIGTERM)
    assert code and requeued(calls) and "preempted or cancelled; saved: step-000002" in said, said


def test_a_failure_is_tried_again_while_something_is_saved(machine: Path) -> None:
    code, said, calls = attempt(machine, "exit 2")
    assert code == 2 and not requeued(calls) and "failed before its first checkpoint (exit code 2)" in said
    for number in range(1, 4):
        code, said, calls = attempt(machine, SAVES + "exit 1", number)
        assert code == 1 and requeued(calls) and "exit code 1; saved: step-000002; queued again" in said
    code, said, calls = attempt(machine, "exit 1", 4)
    assert code == 1 and not requeued(calls) and "4 attempts in a row have saved nothing new" in said
    moved = SAVES.replace("step-000002", "step-000004")
    assert requeued(attempt(machine, moved + "exit 1", 5)[2])


def test_a_budget_of_restarts(machine: Path) -> None:
    code, said, calls = attempt(machine, SAVES + "exit 1", 2, MAX_RESTARTS=2)
    assert code == 1 and not requeued(calls) and "MAX_RESTARTS=2 is reached" in said
