"""Packed layouts, prompts shared or not, against one stock forward for each sequence; values and gradients in float64.

The oracle is `naive_logps`: log pi(completion | prompt) from a plain forward over prompt + completion, nothing packed.
Llama's norms are replaced by exact ones on both sides, so that only the order of float64 sums differs: 1e-12.
"""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dpo_dist.attention.interface import register
from dpo_dist.model import ScoringModel, load_model
from dpo_dist.pretrained import load_config
from dpo_dist.tokenization import TokenizedExample
from tests.parity.oracle import (
    VOCABULARY,
    gradients,
    llama_config,
    naive_logps,
    naive_token_logps,
    objective,
    our_logps,
    packed,
    random_example,
    stock_and_ours,
    with_exact_norms,
)

# Lengths of the prompt and of each completion, of each example.
SHAPES: dict[str, list[tuple[int, list[int]]]] = {
    "one pair": [(6, [5, 3])],
    "one completion": [(6, [5])],
    "one-token prompt": [(1, [4, 7])],
    "one-token completions": [(5, [1, 1])],
    "one token of each": [(1, [1, 1])],
    "a one-token completion first": [(5, [1, 6])],
    "a one-token completion last": [(5, [6, 1])],
    "five completions": [(9, [3, 1, 8, 2, 5])],
    "one to five completions": [(4, [2]), (3, [1, 5]), (7, [4, 4, 1]), (2, [3, 1, 1, 9]), (5, [2, 6, 1, 4, 3])],
    "many": [(1 + 3 * i % 11, [1 + 5 * i % 7, 1 + 2 * i % 5]) for i in range(14)],
}


def examples_of(shape: Sequence[tuple[int, list[int]]]) -> list[TokenizedExample]:
    return [random_example(seed, *lengths) for seed, lengths in enumerate(shape)]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def models(request: pytest.FixtureRequest) -> tuple:
    stock, ours = stock_and_ours(llama_config(tied=request.param), stock_attention="sdpa")
    assert (ours.model.lm_head.weight is ours.model.model.embed_tokens.weight) == request.param
    return with_exact_norms(stock), with_exact_norms(ours)


@pytest.fixture(scope="module")
def ours() -> ScoringModel:
    return stock_and_ours(llama_config(), torch.float32)[1]


# ---- values and gradients


@pytest.mark.parametrize("name", list(SHAPES))
def test_equals_one_sequence_at_a_time(models: tuple, name: str) -> None:
    stock, ours = models
    examples = examples_of(SHAPES[name])
    expected = naive_logps(stock, examples)
    expected_gradients = gradients(stock, objective(expected))
    for share in (True, False):
        logps = our_logps(ours, examples, share)
        torch.testing.assert_close(logps, expected, rtol=1e-11, atol=1e-11)
        ours_gradients = gradients(ours, objective(logps))
        assert ours_gradients.keys() == expected_gradients.keys()
        for parameter, gradient in expected_gradients.items():
            assert float(gradient.abs().max()) > 0
            torch.testing.assert_close(ours_gradients[parameter], gradient, rtol=1e-9, atol=1e-11)


def test_sharing_computes_the_prompt_once() -> None:
    """P + sum(C - 1) tokens against K P + sum(C - 1): the last token of a completion is never an input."""
    examples = examples_of([(9, [3, 1, 8, 2, 5])])
    assert packed(examples, True).num_tokens == len(packed(examples, True).input_ids_T) == 9 + 19 - 5
    assert packed(examples, False).num_tokens == len(packed(examples, False).input_ids_T) == 5 * 9 + 19 - 5


def test_token_logps_belong_to_their_tokens(models: tuple) -> None:
    """Not only the sums: each scored token's own value, in the order of completions."""
    stock, ours = models
    examples = examples_of(SHAPES["one to five completions"])
    expected = [naive_token_logps(stock, e.prompt_ids, ids) for e in examples for ids in e.completion_ids]
    for share in (True, False):
        torch.testing.assert_close(ours(packed(examples, share)), torch.cat(expected), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("share", [True, False])
def test_order_of_completions_and_examples_is_irrelevant(models: tuple, share: bool) -> None:
    _, ours = models
    examples = examples_of([(4, [2, 6, 1]), (3, [5, 3])])
    swapped = [replace(examples[1]), replace(examples[0], completion_ids=examples[0].completion_ids[::-1])]
    logps, others = our_logps(ours, examples, share), our_logps(ours, swapped, share)
    torch.testing.assert_close(others, logps[[3, 4, 2, 1, 0]], rtol=1e-11, atol=1e-11)


# ---- who may see whom, to the last bit


def with_token(example: TokenizedExample, completion: int, position: int) -> TokenizedExample:
    """Another token at one place of one completion."""
    completions = [list(ids) for ids in example.completion_ids]
    completions[completion][position] = completions[completion][position] % (VOCABULARY - 1) + 1
    return replace(example, completion_ids=tuple(tuple(ids) for ids in completions))


@pytest.mark.parametrize("share", [True, False])
def test_changing_a_token_leaves_the_other_completions_bit_identical(ours: ScoringModel, share: bool) -> None:
    examples = examples_of([(6, [4, 1, 7]), (3, [5, 2]), (5, [1, 6])])
    owner = [(e, c) for e, example in enumerate(examples) for c in range(len(example.completion_ids))]
    with torch.no_grad():
        before = our_logps(ours, examples, share)
        for changed, (e, c) in enumerate(owner):
            length = len(examples[e].completion_ids[c])
            for position in {0, length // 2, length - 1}:
                others = [*examples[:e], with_token(examples[e], c, position), *examples[e + 1 :]]
                after = our_logps(ours, others, share)
                differs = (after != before).tolist()
                assert differs == [index == changed for index in range(len(owner))]


@pytest.mark.parametrize("share", [True, False])
def test_a_token_only_acts_on_what_follows_it(ours: ScoringModel, share: bool) -> None:
    example = random_example(0, 5, [6, 4])
    with torch.no_grad():
        before = ours(packed([example], share))
        after = ours(packed([with_token(example, 0, 3)], share))
    # Its own log-probability and those of later tokens of the same completion.
    assert (after != before).tolist() == [False] * 3 + [True] * 3 + [False] * 4


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("position", [0, 2, 4])
def test_changing_a_prompt_token_changes_its_completions_and_no_others(
    ours: ScoringModel, share: bool, position: int
) -> None:
    examples = examples_of([(5, [3, 4]), (5, [2, 6]), (5, [1, 2])])
    prompt = list(examples[1].prompt_ids)
    prompt[position] = prompt[position] % (VOCABULARY - 1) + 1
    others = [examples[0], replace(examples[1], prompt_ids=tuple(prompt)), examples[2]]
    with torch.no_grad():
        differs = our_logps(ours, others, share) != our_logps(ours, examples, share)
    assert differs.tolist() == [False, False, True, True, False, False]


# ---- gradients outside of the objective


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("inside", [0, 1, 2])
def test_gradient_is_zero_outside_the_objective_and_not_inside(models: tuple, share: bool, inside: int) -> None:
    """Every example has tokens of its own; only one example's completions are in the objective."""
    embedding = models[1].model.model.embed_tokens.weight
    if embedding is models[1].model.lm_head.weight:
        return  # tied: the softmax gives every token a gradient
    vocabularies = [range(1, 20), range(20, 40), range(40, 60)]
    lengths = [(6, [4, 5]), (3, [1, 6]), (5, [7, 2])]
    examples = [random_example(i, *lengths[i], tokens=vocabularies[i]) for i in range(3)]
    logps = our_logps(models[1], examples, share)
    embedding_gradient = gradients(models[1], logps[2 * inside] - logps[2 * inside + 1])["model.embed_tokens.weight"]
    example = examples[inside]
    inputs = {*example.prompt_ids, *(token for ids in example.completion_ids for token in ids[:-1])}
    is_nonzero = (embedding_gradient != 0).any(1)
    assert is_nonzero.nonzero()[:, 0].tolist() == sorted(inputs)
    assert (embedding_gradient[~is_nonzero] == 0).all()


@pytest.mark.parametrize("share", [True, False])
def test_gradient_of_one_completion_leaves_its_sibling_alone(models: tuple, share: bool) -> None:
    if models[1].model.lm_head.weight is models[1].model.model.embed_tokens.weight:
        return
    example = TokenizedExample((1, 2, 3), ((10, 11, 12), (20, 21, 22)), (), "")
    for index, inside, outside in ((0, [10, 11], [20, 21, 22, 12]), (1, [20, 21], [10, 11, 12, 22])):
        logps = our_logps(models[1], [example], share)
        gradient = gradients(models[1], logps[index])["model.embed_tokens.weight"]
        assert (gradient[[1, 2, 3, *inside]] != 0).any(1).all()
        assert (gradient[outside] == 0).all()


def test_a_filler_gives_every_parameter_a_gradient_of_zero(models: tuple) -> None:
    """A gradient, or ZeRO would wait for it; zero, or an idle rank would train."""
    filler = packed([], share=True)
    assert filler.num_tokens == 0
    logps = filler.completion_sums(models[1](filler))
    assert logps.shape == (0,)
    found = gradients(models[1], logps.sum())
    assert found.keys() == {name.removeprefix("model.") for name, _ in models[1].named_parameters()}
    assert all((gradient == 0).all() for gradient in found.values())


# ---- activation recomputation


def count_forwards(model: ScoringModel) -> list[int]:
    """A list that grows by the layer's number whenever a decoder layer's second half runs."""
    calls: list[int] = []
    for number, layer in enumerate(model.model.model.layers):
        # Before, not after: recomputation stops in the middle of the last product, once it has what backward needs.
        layer.mlp.register_forward_pre_hook(lambda *_, number=number: calls.append(number))
    return calls


@pytest.mark.parametrize("share", [True, False])
def test_recomputation_changes_nothing_and_happens(share: bool, tmp_path) -> None:
    stock, _ = stock_and_ours(llama_config(), torch.float32)
    stock.save_pretrained(tmp_path)
    results: list[tuple[Tensor, dict[str, Tensor]]] = []
    for recompute, runs in ((False, 1), (True, 2)):
        config = load_config(tmp_path, trust_remote_code=False)
        model = load_model(tmp_path, config, register("sdpa"), torch.float32, {}, recompute, trust_remote_code=False)
        calls = count_forwards(model.train())
        logps = our_logps(model, examples_of(SHAPES["one to five completions"]), share)
        assert calls == [0, 1]
        results.append((logps.detach(), gradients(model, objective(logps))))
        assert sorted(calls) == sorted([0, 1] * runs)
    assert torch.equal(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        assert torch.equal(results[1][1][name], gradient), name
