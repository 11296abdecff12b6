"""An 8B model in bfloat16 through flash-attn's real Python interface: shapes, dtypes, devices, calls, copies."""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.launching import REPOSITORY, environment

LAYERS = 32
FAULTS = ("positions on the host", "float32 weights", "field by field")


def _observed(folder: Any, *faults: str) -> dict[str, Any]:
    out = folder / "out.json"
    worker = [sys.executable, "-m", "tests.gpu_contract.meta_worker", str(out), *faults]
    done = subprocess.run(worker, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return _observed(tmp_path_factory.mktemp("honest"))


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return _observed(tmp_path_factory.mktemp("faulty"), *FAULTS)


@pytest.mark.parametrize(("recompute", "forwards"), [("keep", LAYERS), ("recompute", 2 * LAYERS)])
def test_one_kernel_call_for_each_layer(honest: dict[str, Any], recompute: str, forwards: int) -> None:
    seen = honest[recompute]
    assert (seen["forward_calls"], seen["backward_calls"]) == (forwards, LAYERS)
    assert seen["flash_dtypes"] == ["torch.bfloat16"]


@pytest.mark.parametrize("recompute", ["keep", "recompute"])
def test_nothing_leaves_the_device_or_comes_to_it(honest: dict[str, Any], recompute: str) -> None:
    seen = honest[recompute]
    assert seen["strangers"] == seen["copies_inside"] == {}
    assert seen["copies"] == {"cpu to meta": 1}  # all of a micro-batch at once


def test_what_comes_out(honest: dict[str, Any]) -> None:
    seen = honest["keep"]
    assert seen["tokens"] > 8192
    (expected, *shape) = seen["scored"]
    assert shape == [expected]
    assert seen["dtype"] == "torch.float32"
    assert seen["wrong_gradients"] == []
    # On one core of a slow server: a GPU needs about a second for these 8600 tokens.
    assert 0 < seen["host_seconds"] < 5


def test_planted_faults_show(faulty: dict[str, Any]) -> None:
    assert "not on the expected device" in faulty["positions on the host"]["error"]
    assert faulty["float32 weights"]["flash_dtypes"] == ["torch.float32"]
    assert faulty["field by field"]["copies"]["cpu to meta"] > 10
