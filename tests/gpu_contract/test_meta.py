"""An 8B model in bfloat16 through flash-attn's real Python interface: shapes, dtypes, devices, calls, copies."""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.launching import REPOSITORY, environment

pytestmark = pytest.mark.thorough

LAYERS = 32
FAULTS = ("positions on the host", "float32 weights", "field by field", "careless")


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("meta") / "out.json"
    worker = [sys.executable, "-m", "tests.gpu_contract.meta_worker", str(out), *FAULTS]
    done = subprocess.run(worker, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


@pytest.mark.parametrize(
    ("recompute", "forwards"), [("keep", LAYERS), ("recompute", 2 * LAYERS), ("statistics", LAYERS)]
)
def test_one_kernel_call_for_each_layer(seen: dict[str, Any], recompute: str, forwards: int) -> None:
    found = seen[recompute]
    assert (found["forward_calls"], found["backward_calls"]) == (forwards, LAYERS)
    assert found["flash_dtypes"] == ["torch.bfloat16"]


@pytest.mark.parametrize("recompute", ["keep", "recompute", "statistics"])
def test_nothing_leaves_the_device_or_comes_to_it(seen: dict[str, Any], recompute: str) -> None:
    found = seen[recompute]
    assert found["strangers"] == found["copies_inside"] == {}
    assert found["copies"] == {"cpu to meta": 1}  # all of a micro-batch at once


def test_what_comes_out(seen: dict[str, Any]) -> None:
    found = seen["keep"]
    assert found["tokens"] > 8192
    (expected, *shape) = found["scored"]
    assert shape == [expected]
    assert found["dtype"] == "torch.float32"
    assert found["wrong_gradients"] == []
    # On one core of a slow server: a GPU needs about a second for these 8600 tokens.
    assert 0 < found["host_seconds"] < 5


def test_statistics_come_from_the_same_logits(seen: dict[str, Any]) -> None:
    silent, asked = seen["keep"], seen["statistics"]
    assert silent["statistics"] == []
    assert asked["statistics"] == [[[4, asked["scored"][0]], "torch.float32", "meta", False]]
    assert asked["scored"] == silent["scored"] and asked["wrong_gradients"] == []
    assert asked["matrix_products"] == silent["matrix_products"] > 2 * LAYERS


def test_planted_faults_show(seen: dict[str, Any]) -> None:
    assert "not on the expected device" in seen["positions on the host"]["error"]
    assert seen["float32 weights"]["flash_dtypes"] == ["torch.float32"]
    assert seen["field by field"]["copies"]["cpu to meta"] > 10


def test_careless_code_shows_at_each_gate(seen: dict[str, Any]) -> None:
    found = seen["careless"]
    assert (found["forward_calls"], found["backward_calls"]) == (2 * LAYERS, LAYERS)
    assert found["copies"] == {"cpu to meta": 2}
    assert found["copies_inside"] == {"cpu to meta": 1}
    assert found["strangers"].keys() == {"aten.add"}
    assert found["wrong_gradients"] == ["model.model.embed_tokens.weight"]
