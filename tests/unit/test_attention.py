"""Kernels by their contract: which call they make, and what it computes; held against the per-segment kernel.

No GPU here, so flash-attn is played by naive loops that take its arguments by keyword only, and torch's kernel runs on
the meta device, where shapes and dtypes are checked and nothing is computed.
"""

import inspect

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

from dpo_dist.attention import AttentionNeeds, choose_backend, interface, segments, varlen
from dpo_dist.attention.gather import gather_tokens
from dpo_dist.attention.interface import register
from dpo_dist.attention.packages import FLASH_2, FLASH_3, FLASH_4
from dpo_dist.batch import AttentionLayout
from dpo_dist.errors import ConfigError, ModelError
from tests.machine import Machine, fake_flash_attn_varlen_func
from tests.parity.oracle import llama_config, our_logps, packed, random_example, stock_and_ours

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
EXAMPLES = [random_example(1, 7, [5, 1, 9]), random_example(2, 1, [4, 6]), random_example(3, 9, [1, 6])]


@pytest.fixture
def fake_flash_attn(machine: Machine) -> None:
    machine.has("8.0", FLASH_2)


def tiny(model_type: str, **settings: object):
    common = {"vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "initializer_range": 0.25}
    return CONFIG_MAPPING[model_type](**common, **heads, **settings)


SOFTCAPPED = {
    "attn_logit_softcapping": 2.0,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
}


@pytest.mark.usefixtures("fake_flash_attn")
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize(
    "config",
    [llama_config(), tiny("mistral", sliding_window=4), tiny("gemma2", **SOFTCAPPED)],
    ids=["causal", "window", "window and softcap"],
)
def test_flash_attn_call_computes_what_the_segments_do(config, share: bool) -> None:
    by_segments, by_flash = (stock_and_ours(config, backend=backend)[1] for backend in ("sdpa", "flash_attn"))
    with torch.no_grad():
        expected, actual = (our_logps(model, EXAMPLES, share) for model in (by_segments, by_flash))
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)


@pytest.mark.usefixtures("fake_flash_attn")
def test_flash_attn_has_no_sinks() -> None:
    _, model = stock_and_ours(tiny("gpt_oss", num_local_experts=4), torch.float32, backend="flash_attn")
    with pytest.raises(
        ConfigError, match=r"attn_implementation=flash_attn: flash-attn 2 has no attention sinks; use sdpa"
    ):
        our_logps(model, EXAMPLES, share=True)


@pytest.mark.parametrize("config", [tiny("gpt_oss", num_local_experts=4), tiny("gemma2")], ids=["sinks", "softcap"])
def test_torch_kernel_has_neither_softcap_nor_sinks(config) -> None:
    _, model = stock_and_ours(config, torch.float32, backend="torch")
    with pytest.raises(ConfigError, match=r"attn_implementation=torch has neither softcap nor attention sinks; use"):
        our_logps(model, EXAMPLES, share=True)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("share", [True, False])
def test_torch_kernel_accepts_our_call(monkeypatch: pytest.MonkeyPatch, window: int | None, share: bool) -> None:
    """Its own shape function on the meta device; its signature; and the arguments that mean causal with a window."""
    real, calls = varlen.varlen_attn, []

    def recording(*arguments: object, **settings: object) -> Tensor:
        inspect.signature(real).bind(*arguments, **settings)
        calls.append(settings)
        return real(*arguments, **settings)

    monkeypatch.setattr(varlen, "varlen_attn", recording)
    layout = packed(EXAMPLES, share).layout
    num_queries, num_keys = int(layout.cu_q[-1]), int(layout.cu_k[-1])
    query = torch.empty(1, 4, num_queries, 64, device="meta", dtype=torch.bfloat16)
    key = value = torch.empty(1, 2, num_keys, 64, device="meta", dtype=torch.bfloat16)
    on_meta = AttentionLayout(layout.cu_q.to("meta"), layout.cu_k.to("meta"), None, layout.q_lengths, layout.k_lengths)
    output = varlen.torch_attention(query, key, value, on_meta, 0.1, window, None, None)
    assert output.shape == (1, num_queries, 4, 64)
    assert (output.dtype, output.device.type) == (torch.bfloat16, "meta")
    (settings,) = calls
    # A right side of 0 is what makes it causal; it is aligned at the bottom right.
    assert settings["window_size"] == ((-1, 0) if window is None else (window - 1, 0))
    assert (settings["max_q"], settings["max_k"]) == (max(layout.q_lengths), max(layout.k_lengths))
    assert (settings["scale"], settings["enable_gqa"]) == (0.1, True)


def test_an_older_torch_is_not_told_of_grouped_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size):
        return query

    monkeypatch.setattr(varlen, "varlen_attn", of_2_11)
    monkeypatch.setattr(varlen, "_GROUPS", varlen._of_groups(of_2_11))
    layout = packed(EXAMPLES, share=True).layout
    num_queries, num_keys = int(layout.cu_q[-1]), int(layout.cu_k[-1])
    query, key = torch.zeros(1, 4, num_queries, 8), torch.zeros(1, 2, num_keys, 8)
    assert varlen.torch_attention(query, key, key, layout, 0.1, None, None, None).shape == (1, num_queries, 4, 8)


def test_layout_says_causal_from_the_bottom_right() -> None:
    """Query i of a segment sees key j exactly where j <= i + keys - queries, and j > that - window."""
    layout = packed(EXAMPLES, share=True).layout
    for num_q, num_k, window in [(3, 7, None), (3, 7, 2), (1, 5, 3), (4, 4, 1), (4, 4, None)]:
        mask = segments.visible(layout, num_q, num_k, window, CPU)
        for i in range(num_q):
            for j in range(num_k):
                last = i + num_k - num_q
                assert bool(mask[i, j]) == (j <= last and (window is None or j > last - window))
    assert segments.visible(layout, 3, 7, 2, CPU) is segments.visible(layout, 3, 7, 2, CPU)  # kept for the layers


# ---- transformers and our names


@pytest.mark.parametrize("backend", ["sdpa", "torch", "flash_attn"])
def test_no_name_looks_like_a_kernel_of_transformers(backend: str) -> None:
    """It refuses architectures without sdpa support by a name with `sdpa` in it, and replaces one with `flash`."""
    name = register(backend)
    assert not [word for word in ("sdpa", "flash", "flex", "eager", "/", "|") if word in name]
    assert len({register(other) for other in ("sdpa", "torch", "flash_attn")}) == 3


def test_a_window_that_is_not_handed_over_is_refused() -> None:
    module = nn.Module()
    interface._require_window(module, None)
    module.sliding_window = 4
    interface._require_window(module, 4)
    with pytest.raises(ModelError, match="has a sliding window and does not pass it to its kernel"):
        interface._require_window(module, None)
    module.is_sliding = False
    interface._require_window(module, None)


# ---- the choice

LLAMA = [AttentionNeeds(head_dim=128)]


def test_auto_takes_the_per_segment_kernel_on_cpu() -> None:
    assert choose_backend("auto", CPU, torch.float32, LLAMA) == ("sdpa", "the only one on cpu")


@pytest.mark.parametrize(
    ("capability", "installed", "taken"),
    [
        ("8.0", [FLASH_2], "flash-attn 2"),
        ("9.0", [FLASH_2, FLASH_3], "flash-attn 3"),
        ("9.0", [FLASH_4], "flash-attn 4"),
        ("10.0", [FLASH_4], "flash-attn 4"),
        ("10.0", [FLASH_2, FLASH_3], "flash-attn 2"),
        ("8.9", [FLASH_2, FLASH_3], "flash-attn 2"),
    ],
)
def test_auto_takes_the_best_package_for_the_device(machine, capability, installed, taken) -> None:
    machine.has(capability, *installed)
    assert choose_backend("auto", CUDA, torch.bfloat16, LLAMA) == ("flash_attn", f"the fastest one, from {taken}")
    assert choose_backend("flash_attn", CUDA, torch.bfloat16, LLAMA) == ("flash_attn", f"as configured, from {taken}")


@pytest.mark.parametrize(
    ("capability", "installed", "function", "why"),
    [
        ("8.0", [], None, "needs the package flash-attn, flash-attn-3 or flash-attn-4, and none is installed"),
        ("8.0", [FLASH_4], fake_flash_attn_varlen_func, "flash-attn 4 is not made for compute capability 8.0"),
        ("10.0", [FLASH_3], fake_flash_attn_varlen_func, "flash-attn 3 is not made for compute capability 10.0"),
        ("9.0", [FLASH_2, FLASH_4], fake_flash_attn_varlen_func, "both are installed, and each overwrites files"),
        ("8.0", [FLASH_2], None, "flash-attn 2 is installed and cannot be imported"),
    ],
    ids=["none", "4 on 8.0", "3 on 10.0", "two that collide", "another module of the name"],
)
def test_without_a_usable_package_torch_is_taken_and_asking_for_one_refused(
    machine, capability, installed, function, why
) -> None:
    machine.has(capability, *installed, function=function)
    chosen, told = choose_backend("auto", CUDA, torch.float16, LLAMA)
    assert chosen == "torch"
    assert told.startswith("flash_attn ") and why in told
    with pytest.raises(ConfigError, match=r"model\.attn_implementation=flash_attn .*; use auto") as refused:
        choose_backend("flash_attn", CUDA, torch.float16, LLAMA)
    assert why in str(refused.value)


@pytest.mark.parametrize(
    ("installed", "needs", "taken", "why"),
    [
        ([FLASH_2], AttentionNeeds(128, has_softcap=True), "flash_attn", "the fastest one, from flash-attn 2"),
        ([], AttentionNeeds(128, has_softcap=True), "sdpa", "torch has no softcap, which the model's architecture"),
        ([FLASH_2], AttentionNeeds(64, has_sinks=True), "sdpa", "flash_attn (flash-attn 2) has no attention sinks"),
        ([FLASH_4], AttentionNeeds(64, has_sinks=True), "flash_attn", "the fastest one, from flash-attn 4"),
        (
            [FLASH_2],
            AttentionNeeds(320),
            "sdpa",
            "torch has no kernel for heads of dimension 320 (multiples of 8 up to",
        ),
        ([FLASH_2], AttentionNeeds(36), "sdpa", "flash_attn (flash-attn 2) has no kernel for heads of dimension 36"),
    ],
)
def test_a_kernel_must_have_what_the_model_needs(machine, installed, needs, taken, why) -> None:
    machine.has("9.0", *installed)
    chosen, told = choose_backend("auto", CUDA, torch.bfloat16, [*LLAMA, needs])
    assert (chosen, why in told) == (taken, True), told


@pytest.mark.parametrize(
    ("needs", "taken"),
    [
        (AttentionNeeds(256), {"9.0": "flash_attn", "10.0": "flash_attn", "11.0": "flash_attn"}),
        (AttentionNeeds(256, has_window=True), {"9.0": "flash_attn", "10.0": "torch", "11.0": "torch"}),
        (AttentionNeeds(192, 128), {"9.0": "flash_attn", "10.0": "flash_attn", "11.0": "flash_attn"}),
        (AttentionNeeds(192), {"9.0": "flash_attn", "10.0": "torch", "11.0": "torch"}),
    ],
)
def test_heads_that_one_device_has_kernels_for_and_another_not(machine: Machine, needs, taken: dict[str, str]) -> None:
    for capability, backend in taken.items():
        machine.has(capability, FLASH_4)
        assert choose_backend("auto", CUDA, torch.bfloat16, [needs])[0] == backend


@pytest.mark.parametrize(
    ("requested", "device", "dtype", "message"),
    [
        ("torch", CPU, torch.bfloat16, "=torch needs a CUDA device, and this run is on cpu; use auto"),
        ("flash_attn", CPU, torch.bfloat16, "attn_implementation=flash_attn needs a CUDA device"),
        ("torch", CUDA, torch.float32, "computes in bfloat16 or float16 only, and model.dtype is float32; use auto"),
    ],
)
def test_a_kernel_that_cannot_run_is_refused(
    requested: str, device: torch.device, dtype: torch.dtype, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_backend(requested, device, dtype, LLAMA)


def test_an_old_device_has_the_per_segment_kernel_only(machine: Machine) -> None:
    machine.has("7.5", FLASH_2)
    chosen, why = choose_backend("auto", CUDA, torch.float16, LLAMA)
    assert chosen == "sdpa" and "torch needs a device of compute capability 8.0 or higher, and this one has 7.5" in why


def test_what_is_configured_is_taken(machine: Machine) -> None:
    machine.has("8.0")
    assert choose_backend("sdpa", CUDA, torch.bfloat16, LLAMA) == ("sdpa", "as configured")
    assert choose_backend("torch", CUDA, torch.bfloat16, LLAMA) == (
        "torch",
        "as configured, with torch's own flash-attn 2: "
        "needs the package flash-attn, flash-attn-3 or flash-attn-4, and none is installed",
    )


# ---- keys and values of shared prompts


@pytest.mark.parametrize("num_completions", [1, 2, 5])
def test_gathered_keys_get_the_gradient_that_index_select_gives(num_completions: int) -> None:
    examples = [random_example(i, 4 + i, [3 + i] * num_completions) for i in range(3)]
    layout = packed(examples, share=True).layout
    if layout.kv_index_U is None:
        assert num_completions == 1
        return
    tokens = torch.randn(1, 2, int(layout.cu_q[-1]), 8, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(1, 2, int(layout.cu_k[-1]), 8, dtype=torch.float64)
    ours, theirs = gather_tokens(tokens, layout), tokens.index_select(2, layout.kv_index_U)
    assert torch.equal(ours, theirs)
    (mine,), (expected,) = (torch.autograd.grad(one, tokens, upstream) for one in (ours, theirs))
    torch.testing.assert_close(mine, expected, rtol=0, atol=1e-14)


def test_no_token_is_twice_among_the_copies_that_are_added_at_once() -> None:
    layout = packed([random_example(1, 5, [2, 3, 1, 4]), random_example(2, 2, [2, 2])], share=True).layout
    assert layout.further_token_F is not None and layout.further_place_F is not None
    # Of both prompts there is a second copy. The one-token completion reads nothing: no fourth copy.
    assert layout.further_lengths == (5 + 2, 5)
    for tokens in layout.further_token_F.split(layout.further_lengths):
        assert len(tokens.unique()) == len(tokens)
    assert layout.kv_index_U is not None and layout.first_copy_T is not None
    assert torch.equal(layout.kv_index_U[layout.first_copy_T], torch.arange(int(layout.cu_q[-1])))
    assert torch.equal(layout.kv_index_U[layout.further_place_F], layout.further_token_F)
