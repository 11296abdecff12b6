"""Two machines of one process each train the same numbers as one machine of two, with each launcher."""

import os
from pathlib import Path

import pytest

from tests.cluster.machines import NAMES, Machines, two_machines
from tests.cluster.runs import compare, environment, reference_run, write_config
from tests.launching import REPOSITORY

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


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
