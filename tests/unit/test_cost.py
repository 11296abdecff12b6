"""Operations of examples against counting them one by one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_dist.data import Pair
from dpo_dist.packing import TOKENS, AttentionCost, CostModel, ExampleSize, Lengths

LENGTHS = st.integers(1, 12)
EXAMPLES = st.lists(st.tuples(LENGTHS, st.lists(LENGTHS, min_size=1, max_size=4)), max_size=4)


@given(examples=EXAMPLES, share=st.booleans(), window=st.one_of(st.none(), st.integers(1, 15)))
def test_visible_keys_are_those_of_the_mask(
    examples: list[tuple[int, list[int]]], share: bool, window: int | None
) -> None:
    """Every query is looked at: one of the prompt, once or for each completion, and those of completions."""

    def seen(position: int) -> int:
        return sum(1 for key in range(position + 1) if window is None or position - key < window)

    def expected(prompt: int, completions: list[int]) -> int:
        copies = 1 if share else len(completions)
        own = sum(seen(prompt + place) for length in completions for place in range(length - 1))
        return copies * sum(map(seen, range(prompt))) + own

    sizes = [ExampleSize(prompt, tuple(completions), ()) for prompt, completions in examples]
    lengths = Lengths.of(sizes)
    assert lengths.visible_keys(share, window).tolist() == [expected(*one) for one in examples]
    assert lengths.input_tokens(share).tolist() == [size.input_tokens(share) for size in sizes]
    assert lengths.scored_tokens.tolist() == [sum(completions) for _, completions in examples]


SIZE = ExampleSize(10, (4, 6), (Pair(0, 1),))
COST = CostModel(
    per_token=100.0,
    attention=(AttentionCost(None, 2.0), AttentionCost(5, 3.0)),
    per_scored_token=1000.0,
)


@pytest.mark.parametrize("share", [True, False])
def test_forward_is_the_sum_of_its_parts(share: bool) -> None:
    lengths = Lengths.of([SIZE])
    tokens = (10 if share else 20) + 3 + 5
    keys = 2.0 * lengths.visible_keys(share, None)[0] + 3.0 * lengths.visible_keys(share, 5)[0]
    assert COST.forward([SIZE], share).tolist() == [100.0 * tokens + keys + 1000.0 * 10]


@pytest.mark.parametrize(("backward", "recomputed"), [(2.0, 0.0), (2.0, 1.0), (1.0, 0.5)])
def test_training_has_what_is_computed_again(backward: float, recomputed: float) -> None:
    cost = CostModel(COST.per_token, COST.attention, COST.per_scored_token, backward, recomputed)
    head = 1000.0 * 10
    body = COST.forward([SIZE], share_prompt=True)[0] - head
    assert cost.training([SIZE], True).tolist() == [(1 + backward + recomputed) * body + (2 + backward) * head]


@given(examples=EXAMPLES, backward=st.sampled_from([1.0, 2.0]), recomputed=st.sampled_from([0.0, 1.0]))
def test_what_is_useful_is_counted_token_by_token(
    examples: list[tuple[int, list[int]]], backward: float, recomputed: float
) -> None:
    """Every prompt once, and nothing that is computed again."""
    cost = CostModel(COST.per_token, COST.attention, COST.per_scored_token, backward, recomputed)

    def of_query(position: int) -> float:
        return 100.0 + 2.0 * (position + 1) + 3.0 * min(position + 1, 5)

    forward = sum(
        sum(map(of_query, range(prompt)))
        + sum(of_query(prompt + place) for length in completions for place in range(length - 1))
        + 1000.0 * sum(completions)
        for prompt, completions in examples
    )
    sizes = [ExampleSize(prompt, tuple(completions), ()) for prompt, completions in examples]
    assert cost.useful(sizes) == pytest.approx((1.0 + backward) * forward)


def test_duplicated_prompts_cost() -> None:
    assert COST.training([SIZE], share_prompt=False)[0] > COST.training([SIZE], share_prompt=True)[0]


def test_without_a_model_tokens_count() -> None:
    assert TOKENS.forward([SIZE, SIZE], share_prompt=True).tolist() == [SIZE.input_tokens(share_prompt=True)] * 2
