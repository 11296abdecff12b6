"""What holds of flash-attn without a GPU: its own kernels through our batch, and its own signatures around our call."""

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.nn.attention.varlen import varlen_attn

from tests.gpu_contract.interpreted import PACKAGES
from tests.launching import REPOSITORY, environment

pytestmark = pytest.mark.thorough

VARLEN = REPOSITORY / "dpo_dist" / "attention" / "varlen.py"
FUNCTION = "flash_attn_varlen_func"
# Of flash-attn 2 and 3 from the installed source; of flash-attn 4 from its wheel, which needs CUDA to be imported.
SOURCES = {
    "flash-attn 2": PACKAGES / "flash_attn" / "flash_attn_interface.py",
    "flash-attn 3": PACKAGES / "hopper" / "flash_attn_interface.py",
    "flash-attn 4": PACKAGES / "flash_attn_4" / "flash_attn" / "cute" / "interface.py",
}


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("interpreted") / "out.json"
    worker = [sys.executable, "-m", "tests.gpu_contract.interpreted_worker", str(out)]
    done = subprocess.run(worker, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


@pytest.mark.parametrize("layout", ["shared", "unshared"])
def test_packed_llama_equals_the_stock_forward(interpreted: dict[str, Any], layout: str) -> None:
    found = interpreted[layout]
    assert found["logps"] < 2e-5
    assert found["num_gradients"] == [21, 21]
    assert found["gradients"] < 2e-5
    assert found["calls"] == 2  # one for each layer
    assert all(0 not in lengths for lengths in found["segments"])


def test_segments_are_what_the_batch_says(interpreted: dict[str, Any]) -> None:
    # Prompt with the first completion, then each further one; the last token of a completion is never an input, and a
    # completion of one token after a shared prompt has no segment.
    assert interpreted["shared"]["segments"][0] == [19 + 8, 6, 1, 5, 9 + 4, 7]
    assert interpreted["unshared"]["segments"][0] == [19 + 8, 19 + 6, 1, 1 + 5, 9 + 4, 9, 9 + 7]


@pytest.mark.parametrize(
    "fault",
    ["not causal", "another scale", "keys of another segment", "as many keys as queries", "values of the keys"],
)
def test_a_planted_fault_shows(interpreted: dict[str, Any], fault: str) -> None:
    assert interpreted[fault]["logps"] > 0.1


def test_a_fault_of_the_gradient_or_an_empty_segment_shows(interpreted: dict[str, Any]) -> None:
    halved = interpreted["half a gradient"]
    assert halved["logps"] < 2e-5 < 0.01 < halved["gradients"]
    assert all(0 in lengths for lengths in interpreted["an empty segment"]["segments"])


# ---- signatures


def _signature(source: Path, name: str) -> inspect.Signature:
    """Of a function in a file, by its syntax alone: nothing is imported, and defaults only count as there."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    arguments = function.args
    first_default = len(arguments.args) - len(arguments.defaults)
    parameters = [
        inspect.Parameter(
            argument.arg,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=None if index >= first_default else inspect.Parameter.empty,
        )
        for index, argument in enumerate(arguments.args)
    ]
    return inspect.Signature(parameters)


def _keywords_of_our_call(function: str, source: str) -> list[str]:
    """The keywords of the one call in a function of varlen.py that has more than six."""
    (ours,) = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == function)
    (call,) = (node for node in ast.walk(ours) if isinstance(node, ast.Call) and len(node.keywords) > 6)
    assert not call.args, "by keyword only: positions differ between the packages"
    return [keyword.arg for keyword in call.keywords if keyword.arg]


@pytest.fixture
def varlen() -> str:
    return VARLEN.read_text(encoding="utf-8")


@pytest.mark.parametrize("package", SOURCES)
def test_our_call_fits_the_signature_of_each_package(package: str, varlen: str) -> None:
    signature = _signature(SOURCES[package], FUNCTION)
    keywords = _keywords_of_our_call("flash_attention", varlen)
    assert len(keywords) == 12
    signature.bind(**dict.fromkeys(keywords))
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        signature.bind(**dict.fromkeys([*keywords, "cu_seqlens"]))
    if package == "flash-attn 4":
        signature.bind(**dict.fromkeys([*keywords, "learnable_sink"]))


def test_positions_differ_so_that_keywords_are_needed() -> None:
    fourth = {name: list(_signature(path, FUNCTION).parameters)[3] for name, path in SOURCES.items()}
    assert fourth == {"flash-attn 2": "cu_seqlens_q", "flash-attn 3": "cu_seqlens_q", "flash-attn 4": "qv"}


@pytest.mark.parametrize(
    ("function", "first", "last"),
    [("flash_attention", "q", "max_seqlen_k"), ("torch_attention", "query", "max_k")],
)
def test_an_argument_by_position_or_by_another_name_shows(function: str, first: str, last: str, varlen: str) -> None:
    assert varlen.count(f" {first}=query") == varlen.count(f" {last}=layout") == 1
    with pytest.raises(AssertionError, match="by keyword only"):
        _keywords_of_our_call(function, varlen.replace(f" {first}=query", " query"))
    theirs = _signature(SOURCES["flash-attn 2"], FUNCTION) if first == "q" else inspect.signature(varlen_attn)
    misspelt = _keywords_of_our_call(function, varlen.replace(f" {last}=layout", " longest_k=layout"))
    with pytest.raises(TypeError, match=f"missing a required argument: '{last}'"):
        theirs.bind(**dict.fromkeys(misspelt))


def test_our_call_fits_the_signature_of_torch(varlen: str) -> None:
    inspect.signature(varlen_attn).bind(**dict.fromkeys(_keywords_of_our_call("torch_attention", varlen)))
