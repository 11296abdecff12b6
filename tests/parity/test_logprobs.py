"""The chunked head against full logits.

Oracle: log p = log_softmax(transform(h W^T + b))[target] over the whole (M, V) matrix, gradients by autograd. In low
precision the rule is flash-attention's: the error against float64 may be at most twice that of the naive formula
computed in the same low precision.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpo_dist.logprobs import CHUNK_TOKENS, LogitTransform, LogProbHead

WIDTH, CHUNK = 12, 8
TRANSFORMS = [
    LogitTransform(),
    LogitTransform(scale=0.25),
    LogitTransform(softcap=3.0),
    LogitTransform(scale=2.0, softcap=3.0),
]


def naive(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, transform: LogitTransform) -> Tensor:
    """softcap * tanh(scale * (h W^T + b) / softcap), then log-softmax in float32 or better, then the target's entry."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * transform.scale
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    return logits.log_softmax(-1)[torch.arange(len(targets)), targets]


def problem(
    num_scored: int, vocabulary: int, with_bias: bool, seed: int = 0
) -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    """Head, hidden states, targets, and one random weight for each log-probability; float64."""
    torch.manual_seed(seed)
    linear = nn.Linear(WIDTH, vocabulary, bias=with_bias, dtype=torch.float64)
    hidden = 2 * torch.randn(num_scored, WIDTH, dtype=torch.float64)
    targets = torch.randint(vocabulary, (num_scored,))
    return linear, hidden, targets, torch.randn(num_scored, dtype=torch.float64)


def run(function, linear: nn.Linear, hidden: Tensor, coefficients: Tensor) -> list[Tensor]:
    """Values, and the gradients of a weighted sum: hidden, weight, bias."""
    leaves = [hidden.detach().clone().requires_grad_(), *linear.parameters()]
    values = function(leaves[0])
    return [values.detach(), *torch.autograd.grad(values, leaves, coefficients.to(values.dtype))]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_equals_full_logits(transform: LogitTransform, with_bias: bool) -> None:
    sizes = [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 5]
    for num_scored, vocabulary in itertools.product(sizes, (7, 64, 130)):
        linear, hidden, targets, coefficients = problem(num_scored, vocabulary, with_bias)
        head = LogProbHead(linear, transform, chunk_tokens=CHUNK)
        ours = run(lambda h, head=head, t=targets: head(h, t), linear, hidden, coefficients)
        oracle = run(
            lambda h, linear=linear, t=targets: naive(h, linear.weight, linear.bias, t, transform),
            linear,
            hidden,
            coefficients,
        )
        assert len(ours) == (4 if with_bias else 3)
        for mine, theirs in zip(ours, oracle, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_gradcheck(transform: LogitTransform) -> None:
    linear, hidden, targets, _ = problem(5, 7, with_bias=True)

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        linear.weight, linear.bias = nn.Parameter(weight), nn.Parameter(bias)
        head = LogProbHead(linear, transform, chunk_tokens=2)
        del head.weight, head.bias  # gradcheck differentiates its own tensors, which are no parameters
        head.weight, head.bias = weight, bias
        return head(hidden, targets)

    inputs = [hidden.requires_grad_(), *(p.detach().clone().requires_grad_() for p in linear.parameters())]
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("frozen", ["weight", "bias", "hidden", "weight bias"])
def test_frozen_parts_get_no_gradient_and_change_no_other(frozen: str) -> None:
    linear, hidden, targets, coefficients = problem(2 * CHUNK + 3, 31, with_bias=True)
    everything = run(lambda h: LogProbHead(linear, LogitTransform(), CHUNK)(h, targets), linear, hidden, coefficients)
    leaves = {"hidden": hidden.clone().requires_grad_(), "weight": linear.weight, "bias": linear.bias}
    for name in frozen.split():
        leaves[name].requires_grad_(False)
    values = LogProbHead(linear, LogitTransform(), CHUNK)(leaves["hidden"], targets)
    values.backward(coefficients)
    for (name, leaf), expected in zip(leaves.items(), everything[1:], strict=True):
        if name in frozen:
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_low_precision_error_is_at_most_twice_the_naive_one(transform: LogitTransform, dtype: torch.dtype) -> None:
    linear, hidden, targets, coefficients = problem(6 * CHUNK + 1, 130, with_bias=True)
    linear, hidden = linear.to(dtype), hidden.to(dtype)
    exact_linear = nn.Linear(WIDTH, 130, dtype=torch.float64)
    exact_linear.load_state_dict({name: value.double() for name, value in linear.state_dict().items()})
    exact = run(
        lambda h: naive(h, exact_linear.weight, exact_linear.bias, targets, transform),
        exact_linear,
        hidden.double(),
        coefficients,
    )
    low = run(lambda h: naive(h, linear.weight, linear.bias, targets, transform), linear, hidden, coefficients)
    head = LogProbHead(linear, transform, chunk_tokens=CHUNK)
    ours = run(lambda h: head(h, targets), linear, hidden, coefficients)
    assert ours[0].dtype == torch.float32
    assert [gradient.dtype for gradient in ours[1:]] == [dtype] * 3
    for mine, theirs, truth in zip(ours, low, exact, strict=True):
        naive_error = float((theirs.double() - truth).abs().max())
        assert naive_error > 0
        assert float((mine.double() - truth).abs().max()) <= 2 * naive_error


def test_sums_over_chunks_are_kept_in_float32() -> None:
    """In bfloat16 a sum of equal terms stops growing at 2^8 of them: 512 chunks of one token would add up to half."""
    linear, hidden, targets, _ = problem(512, 7, with_bias=True)
    linear = linear.bfloat16()
    hidden, targets = hidden[:1].bfloat16().expand(512, WIDTH), targets[:1].expand(512)
    one, many = (
        run(lambda h, n=n: LogProbHead(linear, LogitTransform(), 1)(h, targets[:n]), linear, hidden[:n], torch.ones(n))
        for n in (1, 512)
    )
    for single, total in zip(one[2:], many[2:], strict=True):
        torch.testing.assert_close(total.float() / 512, single.float(), rtol=2**-7, atol=1e-6)


def test_extreme_logits_stay_finite() -> None:
    linear, hidden, targets, coefficients = problem(9, 31, with_bias=False)
    for values in run(
        lambda h: LogProbHead(linear, LogitTransform(), 4)(h, targets), linear, 1e4 * hidden, coefficients
    ):
        assert values.isfinite().all()


def test_logits_of_at_most_one_chunk_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, hidden, targets, coefficients = problem(3 * CHUNK + 5, 31, with_bias=False)
    rows = []
    monkeypatch.setattr(F, "linear", lambda h, w, b: rows.append(len(h)) or h @ w.T)
    head = LogProbHead(linear, LogitTransform(), CHUNK)
    run(lambda h: head(h, targets), linear, hidden, coefficients)
    assert rows == [CHUNK, CHUNK, CHUNK, 5] * 2  # once in forward, once in backward
    saved = head(hidden.requires_grad_(), targets).grad_fn.saved_tensors
    assert max(tensor.numel() for tensor in saved) == hidden.numel()
    assert LogProbHead(linear, LogitTransform()).chunk_tokens == CHUNK_TOKENS


def test_is_the_stock_head_without_targets() -> None:
    linear, hidden, *_ = problem(10, 31, with_bias=True)
    head = LogProbHead(linear, LogitTransform(scale=3.0, softcap=2.0), CHUNK)
    assert torch.equal(head(hidden.view(2, 5, WIDTH)), linear(hidden.view(2, 5, WIDTH)))
    assert head.weight is linear.weight
    assert head.bias is linear.bias
    assert head.state_dict().keys() == linear.state_dict().keys()


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_probabilities_of_a_single_chunk_are_kept(monkeypatch: pytest.MonkeyPatch, transform: LogitTransform) -> None:
    linear, hidden, targets, coefficients = problem(CHUNK, 31, with_bias=True)
    products: list[int] = []
    stock = F.linear
    monkeypatch.setattr(F, "linear", lambda *arguments: products.append(1) or stock(*arguments))
    found = {}
    for chunk in (CHUNK, CHUNK - 1):
        products.clear()
        head = LogProbHead(linear, transform, chunk)
        found[chunk] = run(lambda h, head=head: head(h, targets), linear, hidden, coefficients)
        # In backward nothing, but for a softcap; of two chunks everything once more.
        assert len(products) == {CHUNK: 1 if transform.softcap is None else 2, CHUNK - 1: 4}[chunk]
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


def test_a_second_backward_is_the_same() -> None:
    linear, hidden, targets, coefficients = problem(CHUNK, 31, with_bias=True)
    leaf = hidden.requires_grad_()
    values = LogProbHead(linear, LogitTransform(), CHUNK)(leaf, targets)
    first, second = (torch.autograd.grad(values, leaf, coefficients, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_nothing_is_kept_without_gradient() -> None:
    linear, hidden, targets, _ = problem(CHUNK, 31, with_bias=True)
    with torch.no_grad():
        assert LogProbHead(linear, LogitTransform(), CHUNK)(hidden.requires_grad_(), targets).grad_fn is None
    values = LogProbHead(linear, LogitTransform(), CHUNK)(hidden, targets)
    assert values.grad_fn.probs_MV.shape == (CHUNK, 31)
    torch.autograd.backward(values.sum())
    assert values.grad_fn.probs_MV is None
