"""While tests run, every annotated call of the package is checked: a wrong shape or dtype raises."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

from dpo_dist.losses.formulas import hinge
from tests.launching import environment

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


def test_the_entry_point_of_launched_ranks_checks_calls(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text(WRONG_SHAPE)
    codes = {}
    for module in ("wrong", "tests.checked"):
        command = [sys.executable, "-m", module, "wrong"]
        done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
        codes[module] = ("TypeCheckError" in done.stderr, done.returncode)
    assert codes == {
        "wrong": (False, 1),
        "tests.checked": (True, 1),
    }  # torch refuses to broadcast, the checks before it
