"""Two machines of one process each train the same numbers as one machine of two, with each launcher."""

from pathlib import Path

import pytest

from tests.cluster.machines import NAMES, Machines, two_machines
from tests.cluster.runs import compare, environment, reference_run, write_config
from tests.launching import REPOSITORY

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory):
    with two_machines(tmp_path_factory.mktemp("machines")) as both:
        yield both


@pytest.fixture(scope="module")
def one_machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference_run(tmp_path_factory.mktemp("one"))


def test_torchrun(machines: Machines, one_machine: Path, tmp_path: Path) -> None:
    write_config(tmp_path)
    command = ["bash", str(REPOSITORY / "launch/torchrun.sh"), "run.yaml"]
    variables = {"NNODES": "2", "NPROC": "1", "HEAD": f"{NAMES[0]}:29511", "RUN_ID": "pair"}
    assert machines.run([command, command], environment() | variables, tmp_path, 200) == [0, 0]
    compare(one_machine, tmp_path)


def test_the_command_with_torchrun(machines: Machines, one_machine: Path, tmp_path: Path) -> None:
    write_config(tmp_path)
    command = ["dpo-dist", "launch", "run.yaml", "--nodes", "2", "--gpus", "1", "--head", f"{NAMES[0]}:29512"]
    assert machines.run([command, command], environment(), tmp_path, 200) == [0, 0]
    compare(one_machine, tmp_path)


def test_the_command_with_deepspeed(machines: Machines, one_machine: Path, tmp_path: Path) -> None:
    write_config(tmp_path)
    (tmp_path / "hosts").write_text("".join(f"{name} slots=1\n" for name in NAMES))
    shared = ["--launcher", "deepspeed", "--nodes", "2", "--gpus", "1", "--hostfile", "hosts"]
    command = ["dpo-dist", "launch", "run.yaml", *shared, "--head", f"{machines.address(0)}:29513", "--node-rank"]
    assert machines.run([[*command, str(node)] for node in range(2)], environment(), tmp_path, 200) == [0, 0]
    compare(one_machine, tmp_path)


def test_a_folder_that_they_do_not_share(machines: Machines, tmp_path: Path) -> None:
    write_config(tmp_path)
    (tmp_path / "out").mkdir()
    command = ["dpo-dist", "launch", "run.yaml", "--nodes", "2", "--gpus", "1", "--head", f"{NAMES[0]}:29514"]
    other = ["bash", "-c", 'mount -t tmpfs none out; exec "$@"', "_", *command]
    assert 0 not in machines.run([command, other], environment(), tmp_path, 200)
    says = f"train.output_dir=out on rank 1 ({NAMES[1]}) is not the folder that the first rank has there ({NAMES[0]})"
    assert says in (tmp_path / f"{NAMES[0]}.log").read_text()


def test_a_machine_that_does_not_reach_the_head(machines: Machines, tmp_path: Path) -> None:
    """Started by hand, as Slurm's own srun would."""
    write_config(tmp_path)
    ranks = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "10.91.77.99", "MASTER_PORT": "29515", "RANK": "1"}
    command = ["dpo-dist", "train", "run.yaml", "parallel.ddp_timeout=5"]
    assert machines.run([command], environment() | ranks, tmp_path, 100) == [1]
    said = (tmp_path / f"{NAMES[0]}.log").read_text()
    assert "error on rank 1: RANK=1 did not reach the first rank at MASTER_ADDR=10.91.77.99, MASTER_PORT=29515" in said
