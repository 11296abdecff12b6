"""What each kernel can do on each device, and flash-attn 3 or 4 in the place of torch's own kernels."""

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.nn import attention as torch_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dpo_dist.attention import AttentionNeeds, choose_backend, interface, varlen
from dpo_dist.attention.choice import Determinism
from dpo_dist.attention.interface import register
from dpo_dist.attention.packages import FLASH_2, FLASH_3, FLASH_4, FlashPackage
from dpo_dist.errors import ConfigError
from tests.machine import Machine
from tests.parity.oracle import packed, random_example

CUDA = torch.device("cuda", 0)
LLAMA = AttentionNeeds(128)
MULTIPLES = "multiples of 8 up to"


@pytest.mark.parametrize(
    ("package", "capability", "needs", "reason"),
    [
        (FLASH_2, "8.9", AttentionNeeds(256, has_window=True, has_softcap=True), None),
        (FLASH_2, "12.0", AttentionNeeds(192, 128), None),
        (FLASH_2, "11.0", LLAMA, "flash-attn 2 is not made for compute capability 11.0"),
        (FLASH_3, "9.0", AttentionNeeds(192, has_window=True, has_softcap=True), None),
        (FLASH_3, "9.0", AttentionNeeds(200), f"(flash-attn 3) has no deterministic backward kernel for heads of "
                                              f"dimension 200 ({MULTIPLES} 192)"),
        (FLASH_4, "9.0", AttentionNeeds(256, has_window=True, has_softcap=True, has_sinks=True), None),
        (FLASH_4, "9.0", AttentionNeeds(264), f"for heads of dimension 264 ({MULTIPLES} 256)"),
        (FLASH_4, "9.0", AttentionNeeds(192, 128), None),
        (FLASH_4, "10.3", AttentionNeeds(128, has_window=True, has_softcap=True, has_sinks=True), None),
        (FLASH_4, "10.0", AttentionNeeds(256, 128), None),
        (FLASH_4, "10.0", AttentionNeeds(256, has_window=True), "no backward kernel with window for heads of"),
        (FLASH_4, "11.0", AttentionNeeds(256, has_softcap=True), "no backward kernel with softcap for heads of"),
        (FLASH_4, "10.0", AttentionNeeds(256, has_sinks=True), "no backward kernel with attention sinks for heads of"),
        (FLASH_4, "10.0", AttentionNeeds(192), f"for heads of dimension 192 ({MULTIPLES} 128, or 192 with values up to "
                                               "128, or 256 with values up to 256)"),
        (FLASH_4, "10.0", AttentionNeeds(192, 128, has_window=True, has_softcap=True), None),
        (FLASH_4, "10.0", AttentionNeeds(192, 160), "for heads of dimension 192 with values of 160"),
        (FLASH_4, "12.0", LLAMA, "flash-attn 4 is not made for compute capability 12.0"),
        (FLASH_2, "8.0", AttentionNeeds(64, 128), "values may be narrower than keys, not wider"),
    ],
)  # fmt: skip
def test_what_a_package_can_do_on_a_device(
    machine: Machine, package: FlashPackage, capability: str, needs: AttentionNeeds, reason: str | None
) -> None:
    machine.has(capability, package)
    if reason is None:
        assert choose_backend("flash_attn", CUDA, torch.bfloat16, [LLAMA, needs])[0] == "flash_attn"
        return
    with pytest.raises(ConfigError, match=r"^model\.attn_implementation=flash_attn .*; use auto") as refused:
        choose_backend("flash_attn", CUDA, torch.bfloat16, [LLAMA, needs])
    assert reason in str(refused.value)


@pytest.mark.parametrize(
    ("package", "capability", "keys", "values", "width"),
    [
        (FLASH_2, "8.0", 192, 128, 192),
        (FLASH_3, "9.0", 192, 128, 192),
        (FLASH_4, "9.0", 192, 128, 192),
        (FLASH_4, "10.0", 192, 128, 128),
        (FLASH_4, "10.0", 192, 96, 128),
        (FLASH_4, "10.0", 256, 128, 256),
        (FLASH_4, "10.0", 128, 64, 128),
    ],
)
def test_values_are_as_wide_as_the_kernel_wants_them(
    machine: Machine, package: FlashPackage, capability: str, keys: int, values: int, width: int
) -> None:
    """DeepSeek's 192 and 128: some kernels take them as they are, others one width only."""

    def kernel(*, q: Tensor, v: Tensor, **_: object) -> Tensor:
        assert (q.shape[2], v.shape[2]) == (keys, width)
        assert torch.equal(v[..., values:], torch.zeros_like(v[..., values:]))
        return v.repeat_interleave(2, 1)[: len(q)]

    machine.has(capability, package, function=kernel)
    layout = packed([random_example(1, 7, [5]), random_example(2, 3, [4])], share=False).layout
    query, value = torch.randn(1, 4, int(layout.cu_q[-1]), keys), torch.randn(1, 2, int(layout.cu_q[-1]), values)
    key = torch.randn(1, 2, int(layout.cu_q[-1]), keys)
    out = varlen.flash_attention(query, key, value, layout, 0.1, None, None, None)
    assert torch.equal(out, value.transpose(1, 2).repeat_interleave(2, 2))


# ---- torch with another package


def torch_has(impl: str | None) -> None:
    """What torch would compute with, asked of its registry and of its dispatcher."""
    assert torch_attention.current_flash_attention_impl() == impl
    if torch.version.cuda is None:  # else torch's own kernels are there as well
        for name in ("_flash_attention_forward", "_flash_attention_backward"):
            found = torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "CUDA")  # type: ignore[attr-defined]
            assert found == (impl is not None)


@contextmanager
def kernels_of_flash_3(*names: str) -> Iterator[None]:
    """What importing flash-attn 3 registers with torch."""
    library = torch.library.Library("flash_attn_3", "FRAGMENT")
    for name in names:
        library.define(f"{name}(Tensor q) -> Tensor")
    try:
        yield
    finally:
        library._destroy()
        for name in names:  # torch keeps what was once looked up
            vars(torch.ops.flash_attn_3).pop(name, None)


@pytest.fixture
def flash_3() -> Iterator[None]:
    with kernels_of_flash_3("fwd", "bwd"):
        yield


@pytest.fixture(autouse=True)
def _nothing_stays_activated() -> Iterator[None]:
    torch_has(None)
    yield
    register("sdpa")
    torch_has(None)


def flash_4_that_returns(machine: Machine, annotation: object) -> None:
    """flash-attn 4's inner module, whose functions torch calls."""
    module = types.ModuleType("flash_attn.cute.interface")

    def forward(q: Tensor) -> object:
        raise NotImplementedError

    forward.__annotations__["return"] = annotation
    module._flash_attn_fwd = module._flash_attn_bwd = forward  # type: ignore[attr-defined]
    machine.monkeypatch.setitem(sys.modules, module.__name__, module)


def torch_as_configured(*needs: AttentionNeeds, deterministic: Determinism = "auto") -> tuple[str, str]:
    return choose_backend("torch", CUDA, torch.bfloat16, [LLAMA, *needs], deterministic)


@pytest.mark.usefixtures("flash_3")
def test_flash_3_is_activated_for_the_run_that_asks_and_for_no_other(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.has("9.0", FLASH_3)
    calls = []
    real = torch_attention.activate_flash_attention_impl
    monkeypatch.setattr(
        "dpo_dist.attention.activation.activate_flash_attention_impl", lambda impl: (calls.append(impl), real(impl))
    )
    backend, why = torch_as_configured()
    assert (backend, why) == ("torch+FA3", "as configured, with flash-attn 3 activated in torch")
    torch_has(None)  # `check` chooses, and changes nothing
    for other in ("torch", "flash_attn", "sdpa"):
        assert register(backend) == register(backend) == register("torch+FA3")  # of both models
        torch_has("FA3")
        register(other)
        torch_has(None)
    assert calls == ["FA3"] * 3


@pytest.mark.usefixtures("flash_3")
def test_auto_activates_nothing(machine: Machine) -> None:
    """Where it comes to torch, the package lacks something, and deterministic gradients are not given up unasked."""
    machine.has("9.0", FLASH_3)
    chosen, why = choose_backend("auto", CUDA, torch.bfloat16, [AttentionNeeds(256)])
    assert (chosen, why.startswith("flash_attn (flash-attn 3) has no deterministic backward kernel")) == ("torch", True)
    assert choose_backend("auto", CUDA, torch.bfloat16, [LLAMA])[0] == "flash_attn"


def test_a_backward_that_may_be_any_has_more_heads(machine: Machine) -> None:
    machine.has("9.0", FLASH_3)
    for deterministic, kernel in ((True, "torch"), ("auto", "torch"), (False, "flash_attn")):
        assert choose_backend("auto", CUDA, torch.bfloat16, [AttentionNeeds(256)], deterministic)[0] == kernel
    assert choose_backend("flash_attn", CUDA, torch.bfloat16, [AttentionNeeds(256)], False)[0] == "flash_attn"


@pytest.mark.parametrize(("deterministic", "asked"), [("auto", True), (True, True), (False, False)])
def test_the_package_is_asked_for_the_backward_that_is_wanted(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, deterministic: Determinism, asked: bool
) -> None:
    machine.has("8.0", FLASH_2)
    calls = []

    def kernel(query: Tensor, *arguments: object, deterministic: bool) -> Tensor:
        calls.append(deterministic)
        return query

    monkeypatch.setitem(interface._KERNELS, "flash_attn", kernel)
    attention = ALL_ATTENTION_FUNCTIONS[register("flash_attn", deterministic)]
    q = torch.zeros(1, 1, 1, 8)
    attention(torch.nn.Module(), q, q, q, dpo_layout=interface._one_segment(1, 1))
    assert calls == [asked]


@pytest.mark.usefixtures("flash_3")
def test_flash_3_in_torch_has_large_heads_unless_they_must_be_deterministic(machine: Machine) -> None:
    machine.has("9.0", FLASH_3)
    assert torch_as_configured(AttentionNeeds(256))[0] == "torch+FA3"
    assert torch_as_configured(AttentionNeeds(256), deterministic=False)[0] == "torch+FA3"
    assert torch_as_configured(deterministic=True)[0] == "torch+FA3"
    backend, why = torch_as_configured(AttentionNeeds(256), deterministic=True)
    assert (backend, "flash-attn 3 has no deterministic backward kernel for heads of dimension 256" in why) == (
        "torch",
        True,
    )


OWN = "as configured, with torch's own flash-attn 2"


@pytest.mark.parametrize(
    ("capability", "installed", "reason"),
    [
        ("9.0", [], ": needs the package flash-attn, flash-attn-3 or flash-attn-4, and none is installed"),
        ("9.0", [FLASH_2], ", as the installed package is flash-attn 2 too"),
        ("8.0", [FLASH_2, FLASH_3], ", as the installed package is flash-attn 2 too"),
        ("8.0", [FLASH_3], ": flash-attn 3 is not made for compute capability 8.0"),
        ("10.0", [FLASH_3], ": flash-attn 3 is not made for compute capability 10.0"),
        ("11.0", [FLASH_4], ": it takes flash-attn 4 on other devices only"),
        ("9.0", [FLASH_2, FLASH_4], ": cannot tell flash-attn from flash-attn-4"),
    ],
)
@pytest.mark.usefixtures("flash_3")
def test_torch_keeps_its_own_kernels_and_says_why(machine: Machine, capability: str, installed, reason: str) -> None:
    machine.has(capability, *installed)
    flash_4_that_returns(machine, tuple[Tensor, Tensor])
    backend, why = torch_as_configured()
    assert backend == "torch"
    assert why.startswith(OWN + reason)


@pytest.mark.parametrize("names", [(), ("fwd",)])
def test_flash_3_without_kernels_is_not_activated(machine: Machine, names: tuple[str, ...]) -> None:
    machine.has("9.0", FLASH_3)
    with kernels_of_flash_3(*names):
        assert torch_as_configured() == ("torch", f"{OWN}: flash-attn 3 registers no kernels with torch")


def test_a_package_that_cannot_be_imported_is_not_activated(machine: Machine) -> None:
    machine.has("9.0", FLASH_3, function=None)
    backend, why = torch_as_configured()
    assert (backend, "flash-attn 3 is installed and cannot be imported" in why) == ("torch", True)


@pytest.mark.parametrize("capability", ["9.0", "10.0"])
def test_flash_4_is_activated_if_it_returns_what_torch_unpacks(machine: Machine, capability: str) -> None:
    machine.has(capability, FLASH_4)
    flash_4_that_returns(machine, tuple[Tensor, Tensor])
    backend, why = torch_as_configured()
    assert (backend, why) == ("torch+FA4", "as configured, with flash-attn 4 activated in torch")
    register(backend)
    torch_has("FA4")
    for annotation in (tuple[Tensor, Tensor, Tensor], Tensor, None):
        flash_4_that_returns(machine, annotation)
        backend, why = torch_as_configured()
        assert backend == "torch" and "flash-attn 4 does not return what torch" in why


def test_torch_fills_values_up_so_that_flash_4_has_no_kernel_for_them(machine: Machine) -> None:
    flash_4_that_returns(machine, tuple[Tensor, Tensor])
    for capability, backend in (("9.0", "torch+FA4"), ("10.0", "torch")):
        machine.has(capability, FLASH_4)
        assert torch_as_configured(AttentionNeeds(192, 128))[0] == backend
