"""What the chunked head tells about the next token's distribution, against the whole matrix of logits.

Oracle: `naive_statistics` of transform(h W^T + b). In low precision the rule is that of test_logprobs.py. Asking
must change no bit of the log-probabilities and of their gradients.
"""

import itertools
import math
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_dist.logprobs import STATISTICS, LogitTransform, LogProbHead
from tests.gpu_contract.syncs_worker import Syncs
from tests.parity.oracle import llama_config, naive_logits, naive_statistics, packed, random_example, stock_and_ours
from tests.parity.test_logprobs import CHUNK, TRANSFORMS, WIDTH, problem, run

SIZES = (0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 5)
ENTROPY, MEAN, TOP1, SQUARES = range(len(STATISTICS))


def full_logits(linear: nn.Linear, hidden: Tensor, transform: LogitTransform) -> Tensor:
    """softcap * tanh(scale * (h W^T + b) / softcap), of all tokens at once."""
    logits = F.linear(hidden, linear.weight, linear.bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * transform.scale
    return logits if transform.softcap is None else transform.softcap * torch.tanh(logits / transform.softcap)


def with_likely_targets(logits: Tensor, targets: Tensor) -> Tensor:
    """Every second target is the most likely token."""
    return torch.where(torch.arange(len(targets)) % 2 == 0, logits.argmax(-1), targets)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_equal_those_of_full_logits(transform: LogitTransform, with_bias: bool) -> None:
    for num_scored, vocabulary in itertools.product(SIZES, (7, 130)):
        linear, hidden, targets, _ = problem(num_scored, vocabulary, with_bias)
        logits = full_logits(linear, hidden, transform)
        targets = with_likely_targets(logits, targets)
        logps, found = LogProbHead(linear, transform, CHUNK)(hidden, targets, STATISTICS)
        assert found.shape == (4, num_scored) and found.dtype == torch.float64
        torch.testing.assert_close(found, naive_statistics(logits, targets), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(logps, logits.log_softmax(-1)[range(num_scored), targets], rtol=1e-12, atol=1e-12)


def test_every_selection_is_told_in_the_order_asked() -> None:
    linear, hidden, targets, _ = problem(2 * CHUNK + 3, 31, with_bias=True)
    head = LogProbHead(linear, LogitTransform(softcap=3.0), CHUNK)
    expected = dict(zip(STATISTICS, head(hidden, targets, STATISTICS)[1], strict=True))
    for count in range(1, 5):
        for names in itertools.permutations(STATISTICS, count):
            found = head(hidden, targets, list(names))[1]
            assert torch.equal(found, torch.stack([expected[name] for name in names])), names
    for wrong in [("entropy", "perplexity"), ("Entropy",)]:
        with pytest.raises(AssertionError, match=wrong[-1]):
            head(hidden, targets, wrong)
    with pytest.raises(AssertionError, match="logits come alone"):
        head(hidden, None, ("entropy",))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_asking_changes_no_bit_of_values_and_gradients(transform: LogitTransform, dtype: torch.dtype) -> None:
    linear, hidden, targets, coefficients = problem(3 * CHUNK + 5, 130, with_bias=True)
    linear, hidden = linear.to(dtype), hidden.to(dtype)
    head = LogProbHead(linear, transform, CHUNK)
    silent = run(lambda h: head(h, targets), linear, hidden, coefficients)
    for names in (STATISTICS[:1], STATISTICS[1:3], STATISTICS):
        asked = run(lambda h, names=names: head(h, targets, names)[0], linear, hidden, coefficients)
        assert all(torch.equal(one, other) for one, other in zip(silent, asked, strict=True)), names
    assert isinstance(head(hidden, targets, ()), Tensor)


def test_statistics_have_no_gradient() -> None:
    linear, hidden, targets, _ = problem(CHUNK + 3, 31, with_bias=True)
    head, hidden = LogProbHead(linear, LogitTransform(), CHUNK), hidden.requires_grad_()
    logps, found = head(hidden, targets, STATISTICS)
    assert logps.requires_grad and not found.requires_grad
    parameters = [hidden, *linear.parameters()]
    # As weights and in a sum they are numbers.
    of_sum = torch.autograd.grad((logps * found[SQUARES]).sum() + found.sum(), parameters)
    of_numbers = torch.autograd.grad(head(hidden, targets), parameters, found[SQUARES].clone())
    assert all(torch.equal(one, other) for one, other in zip(of_sum, of_numbers, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@torch.no_grad()
def test_low_precision_error_is_at_most_twice_the_naive_one(transform: LogitTransform, dtype: torch.dtype) -> None:
    linear, hidden, targets, _ = problem(6 * CHUNK + 1, 130, with_bias=True)
    linear, hidden = linear.to(dtype), hidden.to(dtype)
    exact_linear = nn.Linear(WIDTH, 130, dtype=torch.float64)
    exact_linear.load_state_dict({name: value.double() for name, value in linear.state_dict().items()})
    exact = naive_statistics(full_logits(exact_linear, hidden.double(), transform), targets)
    low_logits = full_logits(linear, hidden, transform)
    low = naive_statistics(low_logits, targets)
    ours = LogProbHead(linear, transform, CHUNK)(hidden, targets, STATISTICS)[1]
    assert ours.dtype == torch.float32
    assert torch.equal(ours[TOP1], low[TOP1])
    for row in (ENTROPY, MEAN, SQUARES):
        naive_error = float((low[row].double() - exact[row]).abs().max())
        assert naive_error > 0
        assert float((ours[row].double() - exact[row]).abs().max()) <= 2 * naive_error, STATISTICS[row]


@torch.no_grad()
def test_float32_and_a_large_vocabulary() -> None:
    """From nearly uniform to nearly certain; rounding of the logits is not counted, for they are multiples of 2^-8."""
    vocabulary = 50_000
    linear = nn.Linear(1, vocabulary, bias=False)
    linear.weight.data = (256 * torch.randn(vocabulary, 1)).round() / 256
    hidden, targets = torch.tensor([[0.0], [1.0], [2.0], [4.0], [16.0], [64.0]]), torch.full((6,), 17)
    ours = LogProbHead(linear, LogitTransform(), 4)(hidden, targets, STATISTICS)[1].double()
    exact = naive_statistics(hidden.double() @ linear.weight.double().T, targets)
    assert exact[ENTROPY][0] > 10 and exact[ENTROPY][-1] < 0.1
    torch.testing.assert_close(ours, exact, rtol=5e-7, atol=2e-7)


@torch.no_grad()
def test_special_values() -> None:
    vocabulary, targets = 33, torch.tensor([0, 1, 5, 6])
    linear = nn.Linear(1, vocabulary, bias=False, dtype=torch.float64)
    linear.weight.data = torch.eye(vocabulary, dtype=torch.float64)[5][:, None]
    hidden = torch.tensor([[0.0], [0.0], [1e4], [1e4]], dtype=torch.float64)  # uniform, uniform, certain, certain
    found = LogProbHead(linear, LogitTransform(), 3)(hidden, targets, STATISTICS)[1]
    log_v = math.log(vocabulary)
    expected = [[log_v, log_v, 0, 0], [0, 0, 1e4 / 33, 1e4 / 33], [1, 0, 1, 0], [-log_v, -log_v, 0, 0]]
    # Where all are equal the first one is the argmax, as for TRL.
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=1e-14)
    linear.weight.data = 1e4 * torch.randn(vocabulary, 1, dtype=torch.float64)
    assert LogProbHead(linear.float(), LogitTransform(), 3)(hidden.float(), targets, STATISTICS)[1].isfinite().all()


class Matrices(TorchDispatchMode):
    """How many matrices of a chunk's logits are alive at once."""

    def __init__(self, num_columns: int) -> None:
        super().__init__()
        self.shape, self.peak, self.references = (CHUNK, num_columns), 0, []

    def __torch_dispatch__(self, operator: Any, kinds: Any, arguments: Any = (), settings: Any = None) -> Any:
        result = operator(*arguments, **(settings or {}))
        if isinstance(result, Tensor) and result.shape == self.shape:
            self.references.append(weakref.ref(result))
        alive = [tensor for reference in self.references if (tensor := reference()) is not None]
        self.peak = max(self.peak, len({tensor.data_ptr() for tensor in alive}))
        return result


@pytest.mark.parametrize("names", [(), STATISTICS[1:3], STATISTICS], ids=str)
def test_asking_takes_no_product_and_no_memory_more(monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]) -> None:
    linear, hidden, targets, _ = problem(3 * CHUNK + 5, 31, with_bias=False)
    rows, stock = [], F.linear
    monkeypatch.setattr(F, "linear", lambda *given: rows.append(len(given[0])) or stock(*given))
    head = LogProbHead(linear, LogitTransform(), CHUNK)
    with Matrices(31) as matrices:
        answer = head(hidden.requires_grad_(), targets, names)
    assert matrices.peak == 2  # in any case: the next chunk's logits are there before the last one's are dropped
    assert rows == [CHUNK, CHUNK, CHUNK, 5]
    logps = answer[0] if names else answer
    saved = {tensor.data_ptr(): tensor.numel() for tensor in logps.grad_fn.saved_tensors}
    assert sorted(saved.values()) == [29, 29, hidden.numel()]  # targets, lse, hidden


def test_nothing_is_read_by_the_host() -> None:
    linear, hidden, targets, _ = problem(2 * CHUNK + 3, 31, with_bias=True)
    head = LogProbHead(linear, LogitTransform(scale=2.0, softcap=3.0), CHUNK)
    with Syncs() as syncs:
        syncs.by_step.append(Counter())
        logps, found = head(hidden.requires_grad_(), targets, STATISTICS)
        logps.sum().backward()
        assert not syncs.by_step[0]
        float(found[0, 0])
    assert sum(syncs.by_step[0].values()) == 1


def test_the_model_passes_them_on() -> None:
    stock, ours = stock_and_ours(llama_config(), torch.float64)
    examples = [random_example(i, 5 + i, [4, 3 + i]) for i in range(3)]
    batch = packed(examples, share=True)
    head: Any = ours.model.get_output_embeddings()
    head.chunk_tokens = 4
    logps, found = ours(batch, STATISTICS)
    assert torch.equal(logps, ours(batch))
    expected = [
        naive_statistics(naive_logits(stock, e.prompt_ids, ids), torch.tensor(ids))
        for e in examples
        for ids in e.completion_ids
    ]
    # Llama's norm rounds to float32.
    torch.testing.assert_close(found, torch.cat(expected, 1), rtol=1e-5, atol=1e-5)
