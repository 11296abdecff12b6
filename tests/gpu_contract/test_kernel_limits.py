"""What we say of the packages' limits, and of torch's switch to them, held to their sources."""

import ast
import inspect
from types import ModuleType

import pytest
from torch.nn.attention import _fa3, _fa4, varlen

from dpo_dist.attention import AttentionNeeds
from dpo_dist.attention.packages import FLASH_4
from tests.gpu_contract.interpreted import PACKAGES

CUTE = PACKAGES / "flash_attn_4" / "flash_attn" / "cute"
HOPPER = PACKAGES / "hopper" / "flash_attn_interface.py"


def _function(source: str, name: str) -> ast.FunctionDef:
    (found,) = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == name)
    return found


def _call(source: str, callee: str) -> ast.Call:
    """The one call of something in a file."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    (found,) = (call for call in calls if ast.unparse(call.func) == callee)
    return found


def _has_kernel(validate: ast.FunctionDef, keys: int, values: int, generation: int) -> bool:
    """What flash-attn 4's own check says; run on its own, for the module around it needs CUDA."""
    names: dict[str, object] = {}
    validate.decorator_list.clear()
    exec(compile(ast.Module([validate], []), "interface.py", "exec"), names)
    try:
        names["_validate_head_dims"](keys, values, generation, 16 // 2)  # type: ignore[operator]
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("generation", FLASH_4.generations)
def test_head_dimensions_of_flash_4_are_those_of_its_own_check(generation: int) -> None:
    validate = _function((CUTE / "interface.py").read_text(), "_validate_head_dims")
    limits = FLASH_4.limits((generation, 0))
    for keys in range(4, 300, 4):
        for values in range(8, keys + 1, 8):
            width = limits.value_width(keys, values)
            ours = limits.obstacle([AttentionNeeds(keys, values)]) is None
            assert ours == _has_kernel(validate, keys, width, generation), (keys, values, width)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("interface.py", '"SM100 backward with head_dim=256 does not support softcap"'),
        ("interface.py", '"SM100 backward with head_dim=256 does not support learnable_sink"'),
        ("sm100_hd256_2cta_fmha_backward.py", '"SM100 backward with head_dim=256 does not support local attention"'),
        ("interface.py", "# The dedicated hd256 backward is deterministic without semaphores."),
        ("interface.py", 'deterministic is False, "deterministic backward not supported on SM 12.0"'),
        ("flash_bwd_sm90.py", '"GQA backward requires head_dim == head_dim_v"'),
    ],
)
def test_flash_4_says_what_else_its_backward_lacks(file: str, words: str) -> None:
    assert words in (CUTE / file).read_text()


# ---- torch's switch


def test_varlen_attention_calls_what_the_switch_replaces() -> None:
    called = inspect.getsource(varlen)
    for adapter in (_fa3, _fa4):
        replaces = inspect.getsource(adapter)
        for name in ("_flash_attention_forward", "_flash_attention_backward"):
            assert f"torch.ops.aten.{name}(" in called
            assert f'"{name}", _{adapter.__name__[-3:]}_flash_attention_' in replaces.replace("(\n        ", "(")
    assert _devices(_fa3) == "!= 9"
    assert _devices(_fa4) == "not in (9, 10)"


def _devices(adapter: ModuleType) -> str:
    start = "if _get_device_major(query.device) "
    (line,) = (line for line in inspect.getsource(adapter).splitlines() if start in line)
    return line.split(start)[1].rstrip(":")


@pytest.mark.parametrize(
    ("theirs", "torchs", "shared"),
    [
        ("flash_attn_3_cuda.fwd", "_FA3_CUDA_FWD", {"q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "seqused_k"}),
        ("flash_attn_3_cuda.bwd", "_FA3_CUDA_BWD", {"dout", "q", "dq", "dv", "max_seqlen_k", "deterministic"}),
    ],
)
def test_torch_calls_flash_3_by_the_positions_that_it_has(theirs: str, torchs: str, shared: set[str]) -> None:
    expected, actual = (
        [ast.unparse(argument) for argument in _call(source, name).args]
        for source, name in ((HOPPER.read_text(), theirs), (inspect.getsource(_fa3), torchs))
    )
    assert len(expected) == len(actual)
    places = {name: (expected.index(name), actual.index(name)) for name in shared}
    assert all(one == other for one, other in places.values()), places


def test_this_flash_4_does_not_fit_this_torch() -> None:
    """If this fails, one of the two has changed: look again at what `activation.py` says of them."""
    source = (CUTE / "interface.py").read_text()
    returns = _function(source, "_flash_attn_fwd").returns
    assert isinstance(returns, ast.Subscript) and isinstance(returns.slice, ast.Tuple)
    assert len(returns.slice.elts) == 5
    assert "out, lse = module._flash_attn_fwd(query, key, value, **kwargs)" in inspect.getsource(_fa4)
    # The backward would fit.
    backward = _function(source, "_flash_attn_bwd")
    accepted = {argument.arg for argument in backward.args.args}
    assert {keyword.arg for keyword in _call(inspect.getsource(_fa4), "module._flash_attn_bwd").keywords} <= accepted
