"""While tests run, every annotated call of the package is checked: a wrong shape or dtype raises."""

import subprocess
import sys

import pytest
import torch
from jaxtyping import TypeCheckError

from dpo_dist.losses.formulas import hinge
from tests.launching import REPOSITORY, environment

WRONG_SHAPE = (
    "import torch; from dpo_dist.losses.formulas import hinge; hinge(torch.zeros(3), torch.zeros(4), beta=0.1)"
)


def test_a_wrong_shape_raises_in_this_process() -> None:
    assert hinge(torch.zeros(4), torch.zeros(4), beta=0.1).shape == (4,)
    with pytest.raises(TypeCheckError):
        hinge(torch.zeros(4), torch.zeros(4, 1), beta=0.1)


def test_a_wrong_dtype_raises_in_this_process() -> None:
    with pytest.raises(TypeCheckError):
        hinge(torch.zeros(4, dtype=torch.int64), torch.zeros(4), beta=0.1)


def test_the_entry_point_of_launched_ranks_checks_calls() -> None:
    # tests/checked.py runs `dpo_dist` as a program; here a program that calls with a wrong shape stands in its place.
    code = (
        "import runpy, types, unittest.mock as mock\n"
        f"def program(*_, **__):\n    {WRONG_SHAPE}\n"
        "run = runpy.run_module\n"
        "with mock.patch('runpy.run_module', program): run('tests.checked', run_name='__main__')\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=environment(), capture_output=True, text=True, check=False
    )
    assert process.returncode == 1
    assert "TypeCheckError" in process.stderr
