"""Kernels by their contract: which call they make, and what it computes; held against the per-segment kernel.

No GPU here, so flash-attn is played by naive loops that take its arguments by keyword only, and torch's kernel runs on
the meta device, where shapes and dtypes are checked and nothing is computed.
"""

import inspect
import sys
import types

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

from dpo_dist import attention
from dpo_dist.attention import choose_backend, register
from dpo_dist.batch import AttentionLayout
from dpo_dist.errors import ConfigError, ModelError
from tests.parity.oracle import llama_config, our_logps, packed, random_example, stock_and_ours

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
EXAMPLES = [random_example(1, 7, [5, 1, 9]), random_example(2, 1, [4, 6]), random_example(3, 9, [1, 6])]


def fake_flash_attn_varlen_func(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
) -> Tensor:
    """flash-attn 2.8's contract, one query of one head at a time; tensors are (tokens, heads, head dimension)."""
    assert causal
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert cu_seqlens_q[-1] == len(q)
    assert cu_seqlens_k[-1] == len(k) == len(v)
    q_lengths, k_lengths = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    assert (max_seqlen_q, max_seqlen_k) == (max(q_lengths), max(k_lengths))
    rows = []
    for segment, (num_q, num_k) in enumerate(zip(q_lengths, k_lengths, strict=True)):
        first_q, first_k = int(cu_seqlens_q[segment]), int(cu_seqlens_k[segment])
        for i in range(num_q):
            last = i + num_k - num_q  # bottom right: the last query sees the last key
            left = 0 if window_size[0] < 0 else max(0, last - window_size[0])
            seen = slice(first_k + left, first_k + last + 1)
            heads = []
            for head in range(q.shape[1]):
                group = head // (q.shape[1] // k.shape[1])
                scores = k[seen, group] @ q[first_q + i, head] * softmax_scale
                if softcap > 0:
                    scores = softcap * torch.tanh(scores / softcap)
                heads.append(scores.softmax(0) @ v[seen, group])
            rows.append(torch.stack(heads))
    return torch.stack(rows)


@pytest.fixture
def fake_flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = fake_flash_attn_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)


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
    with pytest.raises(ConfigError, match=r"attn_implementation=flash_attn has no attention sinks; use sdpa"):
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
    real, calls = attention.varlen_attn, []

    def recording(*arguments: object, **settings: object) -> Tensor:
        inspect.signature(real).bind(*arguments, **settings)
        calls.append(settings)
        return real(*arguments, **settings)

    monkeypatch.setattr(attention, "varlen_attn", recording)
    layout = packed(EXAMPLES, share).layout
    num_queries, num_keys = int(layout.cu_q[-1]), int(layout.cu_k[-1])
    query = torch.empty(1, 4, num_queries, 64, device="meta", dtype=torch.bfloat16)
    key = value = torch.empty(1, 2, num_keys, 64, device="meta", dtype=torch.bfloat16)
    on_meta = AttentionLayout(layout.cu_q.to("meta"), layout.cu_k.to("meta"), None, layout.q_lengths, layout.k_lengths)
    output = attention._torch_varlen(query, key, value, on_meta, 0.1, window, None, None)
    assert output.shape == (1, num_queries, 4, 64)
    assert (output.dtype, output.device.type) == (torch.bfloat16, "meta")
    (settings,) = calls
    # A right side of 0 is what makes it causal; it is aligned at the bottom right.
    assert settings["window_size"] == ((-1, 0) if window is None else (window - 1, 0))
    assert (settings["max_q"], settings["max_k"]) == (max(layout.q_lengths), max(layout.k_lengths))
    assert (settings["scale"], settings["enable_gqa"]) == (0.1, True)


def test_layout_says_causal_from_the_bottom_right() -> None:
    """Query i of a segment sees key j exactly where j <= i + keys - queries, and j > that - window."""
    layout = packed(EXAMPLES, share=True).layout
    for num_q, num_k, window in [(3, 7, None), (3, 7, 2), (1, 5, 3), (4, 4, 1), (4, 4, None)]:
        mask = attention._visible(layout, num_q, num_k, window, CPU)
        for i in range(num_q):
            for j in range(num_k):
                last = i + num_k - num_q
                assert bool(mask[i, j]) == (j <= last and (window is None or j > last - window))
    assert attention._visible(layout, 3, 7, 2, CPU) is attention._visible(layout, 3, 7, 2, CPU)  # kept for the layers


# ---- transformers and our names


@pytest.mark.parametrize("backend", ["sdpa", "torch", "flash_attn"])
def test_no_name_looks_like_a_kernel_of_transformers(backend: str) -> None:
    """It refuses architectures without sdpa support by a name with `sdpa` in it, and replaces one with `flash`."""
    name = register(backend)
    assert not [word for word in ("sdpa", "flash", "flex", "eager", "/", "|") if word in name]
    assert len({register(other) for other in ("sdpa", "torch", "flash_attn")}) == 3


def test_a_window_that_is_not_handed_over_is_refused() -> None:
    module = nn.Module()
    attention._require_window(module, None)
    module.sliding_window = 4
    attention._require_window(module, 4)
    with pytest.raises(ModelError, match="has a sliding window and does not hand it to its kernel"):
        attention._require_window(module, None)
    module.is_sliding = False
    attention._require_window(module, None)


# ---- the choice


def test_auto_takes_the_per_segment_kernel_on_cpu() -> None:
    chosen, why = choose_backend("auto", CPU, torch.float32)
    assert (chosen, why) == ("sdpa", "the only one on cpu")


@pytest.mark.usefixtures("fake_flash_attn")
def test_auto_takes_flash_attn_where_it_can() -> None:
    assert choose_backend("auto", CUDA, torch.bfloat16) == ("flash_attn", "the fastest one")
    chosen, why = choose_backend("auto", CUDA, torch.float32)
    assert chosen == "sdpa"
    assert "flash_attn computes in bfloat16 or float16 only, and model.dtype is float32" in why


def test_auto_takes_torch_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # import fails
    chosen, why = choose_backend("auto", CUDA, torch.float16)
    assert chosen == "torch"
    assert why.startswith("flash_attn needs the package flash-attn (pip install dpo-dist[flash]): ")


def test_a_package_of_the_name_without_the_function_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn 4 installs a namespace `flash_attn` that holds other things."""
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    assert choose_backend("auto", CUDA, torch.bfloat16)[0] == "torch"


@pytest.mark.parametrize(
    ("requested", "device", "dtype", "message"),
    [
        (
            "torch",
            CPU,
            torch.bfloat16,
            "attn_implementation=torch needs a CUDA device, and this run is on cpu; use auto",
        ),
        ("flash_attn", CPU, torch.bfloat16, "attn_implementation=flash_attn needs a CUDA device"),
        ("torch", CUDA, torch.float32, "computes in bfloat16 or float16 only, and model.dtype is float32; use auto"),
    ],
)
def test_a_kernel_that_cannot_run_is_refused(
    requested: str, device: torch.device, dtype: torch.dtype, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_backend(requested, device, dtype)


def test_what_is_configured_is_taken() -> None:
    assert choose_backend("sdpa", CUDA, torch.bfloat16) == ("sdpa", "as configured")
    assert choose_backend("torch", CUDA, torch.bfloat16) == ("torch", "as configured")
