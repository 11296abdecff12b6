"""`launch/sweep.sh` and `sweep.sbatch` with stand-ins for Slurm; on a real one in tests/cluster/test_slurm.py."""

import shlex
from pathlib import Path

import pytest

from tests.cli.test_launch_files import LAUNCH, SAVES, machine, run  # noqa: F401  (a fixture)

LINES = "loss.beta=0.05 train.learning_rate=5e-7\nmodel.dtype=a/b\n"


@pytest.fixture
def cluster(machine: Path) -> Path:  # noqa: F811
    """Both nodes, sbatch, and a sweep of two lines."""
    path = machine / "bin/sbatch"
    path.write_text(
        '#!/bin/bash\nprintf "%q " sbatch "$@" >> "$CALLS/calls"; echo "COMMAND=${COMMAND:-}" >> "$CALLS/calls"\n'
        '[ "$FAILS" = 1 ] && echo "sbatch: error: no such partition" >&2 && exit 1\necho "17;cluster"\n'
    )
    path.chmod(0o755)
    (machine / "lines").write_text(LINES)
    return machine


def submitted(calls: list[str]) -> list[list[str]]:
    return [shlex.split(call) for call in calls if call.startswith("sbatch ")]


def test_the_reference_is_scored_once_and_every_line_waits_for_it(cluster: Path) -> None:
    options = {"SBATCH_OPTIONS": "--nodes 2 --time 12:00:00", "SCORE_OPTIONS": "--nodes 1", "AT_ONCE": "4"}
    code, said, calls = run(cluster, "sweep.sh", "run.yaml", "out", "lines", "train.seed=7", **options)
    assert code == 0 and "job 17: 2 runs; afterwards: dpo-dist compare out" in said
    scoring, runs = submitted(calls)
    shared = ["reference.source=cache", "train.seed=7"]
    assert scoring[2:] == [
        "--job-name=dpo_dist-reference", "--nodes", "1", str(LAUNCH / "slurm.sbatch"), "run.yaml", "out", *shared,
        "COMMAND=precompute",
    ]  # fmt: skip
    assert runs[2:] == [
        "--array=1-2%4", "--dependency=afterok:17", "--kill-on-invalid-dep=yes", "--nodes", "2", "--time", "12:00:00",
        str(LAUNCH / "sweep.sbatch"), "run.yaml", "out", "lines", *shared, "COMMAND=",
    ]  # fmt: skip


def test_without_a_reference_and_dry(cluster: Path) -> None:
    code, _, calls = run(cluster, "sweep.sh", "run.yaml", "out", "lines", REFERENCE="0")
    (runs,) = submitted(calls)
    assert code == 0 and runs[2:-1] == ["--array=1-2", str(LAUNCH / "sweep.sbatch"), "run.yaml", "out", "lines"]
    code, said, calls = run(cluster, "sweep.sh", "run.yaml", "out", "lines", DRY_RUN="1")
    assert code == 0 and not submitted(calls)
    assert said.count("sbatch --parsable") == 2 and "--dependency=afterok:0" in said


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "lines cannot be read; write a line of settings"),
        ("", "lines is empty; write a line of settings"),
        ("a.b=1\n\na.b=2\n", "lines: line 2 holds no settings"),
        ("a.b=1\n# more\n", "lines: line 2 holds no settings"),
    ],
)
def test_mistakes_in_the_lines(cluster: Path, content: str | None, says: str) -> None:
    (cluster / "lines").unlink()
    if content is not None:
        (cluster / "lines").write_text(content)
    code, said, calls = run(cluster, "sweep.sh", "run.yaml", "out", "lines")
    assert code == 2 and says in said and not submitted(calls)


def test_a_last_line_without_an_end_and_a_missing_argument(cluster: Path) -> None:
    (cluster / "lines").write_text("loss.beta=1\nloss.beta=2")
    _, said, _ = run(cluster, "sweep.sh", "run.yaml", "out", "lines")
    assert "2 runs" in said
    code, said, calls = run(cluster, "sweep.sh", "run.yaml", "out")
    assert code == 2 and said.startswith("usage: launch/sweep.sh CONFIG FOLDER LINES") and not calls


def test_nothing_waits_for_a_job_that_was_refused(cluster: Path) -> None:
    code, said, calls = run(cluster, "sweep.sh", "run.yaml", "out", "lines", FAILS="1")
    assert code != 0 and "no such partition" in said and len(submitted(calls)) == 1


@pytest.mark.parametrize(
    ("number", "name", "settings"),
    [
        ("1", "loss.beta=0.05,train.learning_rate=5e-7", "loss.beta=0.05 train.learning_rate=5e-7"),
        ("2", "model.dtype=a_b", "model.dtype=a/b"),
    ],
)
def test_a_run_has_its_lines_settings_and_folder(cluster: Path, number: str, name: str, settings: str) -> None:
    variables = {"SLURM_JOB_ID": "18", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[0-1]", "ATTEMPT": SAVES}
    variables |= {"SLURM_ARRAY_TASK_ID": number, "LAUNCH_FOLDER": str(LAUNCH), "OUT": f"out/{name}"}
    code, said, calls = run(cluster, "sweep.sbatch", "run.yaml", "out", "lines", "train.seed=7", **variables)
    assert code == 0 and f"finished; the model is in out/{name}/model" in said
    started = "\n".join(calls)
    assert "srun --nodes=2" in started
    assert started.endswith(f"run.yaml train.output_dir=out/{name} checkpoint.resume=auto train.seed=7 {settings}")


def test_an_array_without_such_a_line(cluster: Path) -> None:
    variables = {"SLURM_ARRAY_TASK_ID": "3", "LAUNCH_FOLDER": str(LAUNCH)}
    code, said, _ = run(cluster, "sweep.sbatch", "run.yaml", "out", "lines", **variables)
    assert code == 2 and "lines has no line 3" in said


def test_both_batch_files_ask_for_the_same() -> None:
    asked = {}
    for name in ("slurm.sbatch", "sweep.sbatch"):
        lines = (LAUNCH / name).read_text().splitlines()
        asked[name] = [line for line in lines if line.startswith("#SBATCH") and "--output" not in line]
    assert asked["slurm.sbatch"] == asked["sweep.sbatch"]


def test_torchrun_starts_another_command(cluster: Path) -> None:
    _, _, calls = run(cluster, "torchrun.sh", "run.yaml", COMMAND="precompute")
    assert any(call.endswith("-m dpo_dist precompute run.yaml") for call in calls)
