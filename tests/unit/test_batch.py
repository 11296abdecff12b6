"""One micro-batch: written out by hand where that is possible, else against a second, slower way to say the same."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo_dist.batch import RankWork, build_micro_batch
from dpo_dist.batch import micro_batch as batch_file
from dpo_dist.data import Pair
from dpo_dist.packing import ExampleSize, Packer
from dpo_dist.tokenization import TokenizedExample

TWO = TokenizedExample((1, 2, 3), ((10, 11), (20, 21, 22)), (Pair(0, 1, 2.0),), "a:1")
ONE_TOKEN = TokenizedExample((5,), ((30,), (40, 41), (50,)), (Pair(1, 0), Pair(2, 1, 0.5)), "a:2")


def test_shared_layout_by_hand() -> None:
    batch = build_micro_batch([TWO, ONE_TOKEN], [0, 2], share_prompts=True)
    #                                prompt  10 | 20 21 | 5 | 40     (the last token of a completion is never an input)
    assert batch.input_ids_T.tolist() == [1, 2, 3, 10, 20, 21, 5, 40]
    assert batch.position_ids_T.tolist() == [0, 1, 2, 3, 3, 4, 0, 1]
    # Segments: prompt + 10; 20 21; 5 (and 30, which has nothing of its own); 40. 50 has nothing to compute: no segment.
    assert batch.layout.q_lengths == (4, 2, 1, 1)
    assert batch.layout.k_lengths == (4, 5, 1, 2)
    assert batch.layout.cu_q.tolist() == [0, 4, 6, 7, 8]
    assert batch.layout.cu_k.tolist() == [0, 4, 9, 10, 12]
    assert batch.layout.kv_index_U is not None
    assert batch.layout.kv_index_U.tolist() == [0, 1, 2, 3, 0, 1, 2, 4, 5, 6, 6, 7]
    assert (batch.layout.max_q, batch.layout.max_k) == (4, 5)
    assert batch.score_index_M.tolist() == [2, 3, 2, 4, 5, 6, 6, 7, 6]
    assert batch.target_ids_M.tolist() == [10, 11, 20, 21, 22, 30, 40, 41, 50]
    assert batch.completion_of_M.tolist() == [0, 0, 1, 1, 1, 2, 3, 3, 4]
    assert batch.completion_index_C.tolist() == [0, 1, 2, 3, 4]
    assert batch.pair_chosen_B.tolist() == [0, 3, 4]
    assert batch.pair_rejected_B.tolist() == [1, 2, 3]
    assert batch.pair_weight_B.tolist() == [2.0, 1.0, 0.5]
    assert batch.num_tokens == 8
    assert batch.num_unshared_tokens == (2 * 3 + 5) + (2 + 3) + (2 + 3)


def test_unshared_layout_by_hand() -> None:
    batch = build_micro_batch([TWO], [4], share_prompts=False)
    assert batch.input_ids_T.tolist() == [1, 2, 3, 10, 1, 2, 3, 20, 21]
    assert batch.position_ids_T.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4]
    assert batch.layout.q_lengths == batch.layout.k_lengths == (4, 5)
    assert batch.layout.kv_index_U is None  # every token once, in order: nothing is gathered
    assert batch.score_index_M.tolist() == [2, 3, 6, 7, 8]
    assert batch.completion_index_C.tolist() == [4, 5]


def test_filler_runs_two_tokens_and_scores_none() -> None:
    batch = build_micro_batch([], [], share_prompts=True)
    assert (len(batch.input_ids_T), batch.num_tokens, batch.num_unshared_tokens) == (2, 0, 0)
    assert batch.layout.q_lengths == batch.layout.k_lengths == (2,)
    empty = (
        batch.score_index_M,
        batch.target_ids_M,
        batch.completion_index_C,
        batch.pair_chosen_B,
        batch.pair_weight_B,
    )
    assert [len(tensor) for tensor in empty] == [0] * 5
    assert batch.completion_sums(torch.zeros(0)).shape == (0,)


RAW = st.lists(
    st.tuples(st.integers(1, 6), st.lists(st.integers(1, 5), min_size=1, max_size=4)), min_size=1, max_size=5
)


@given(raw=RAW, share=st.booleans())
def test_every_query_sees_its_prompt_and_its_own_completion_and_nothing_else(
    raw: list[tuple[int, list[int]]], share: bool
) -> None:
    """The visible tokens of every scored position, in order, are exactly prompt + the completion before the target."""
    examples, fresh = [], iter(range(100_000))  # every token of the batch is another id
    for prompt, completions in raw:
        ids = tuple(tuple(next(fresh) for _ in range(length)) for length in completions)
        examples.append(TokenizedExample(tuple(next(fresh) for _ in range(prompt)), ids, (), ""))
    batch = build_micro_batch(examples, [10 * i for i in range(len(examples))], share)
    layout, ids, index = batch.layout, batch.input_ids_T.tolist(), batch.layout.kv_index_U
    keys = list(range(len(ids))) if index is None else index.tolist()
    visible: dict[int, list[int]] = {}  # of each packed token: the ids it sees, itself last
    for s, (num_q, num_k) in enumerate(zip(layout.q_lengths, layout.k_lengths, strict=True)):
        for i in range(num_q):
            first = int(layout.cu_k[s])
            seen = keys[first : first + i + num_k - num_q + 1]
            visible[int(layout.cu_q[s]) + i] = [ids[token] for token in seen]
    assert sorted(visible) == list(range(len(ids)))
    for token, seen in visible.items():
        assert seen[-1] == ids[token]
        assert int(batch.position_ids_T[token]) == len(seen) - 1
    expected = [
        ([*example.prompt_ids, *completion[:i]], target)
        for example in examples
        for completion in example.completion_ids
        for i, target in enumerate(completion)
    ]
    scored = zip(batch.score_index_M.tolist(), batch.target_ids_M.tolist(), strict=True)
    assert [(visible[position], target) for position, target in scored] == expected
    sizes = [ExampleSize(prompt, tuple(lengths), ()) for prompt, lengths in raw]
    assert batch.num_tokens == len(ids) == sum(size.input_tokens(share) for size in sizes)


def test_completion_sums_add_up_and_keep_their_precision() -> None:
    batch = build_micro_batch([TWO, ONE_TOKEN], [0, 2], share_prompts=True)
    values = torch.arange(9, dtype=torch.float64).requires_grad_()
    sums = batch.completion_sums(values)
    assert sums.tolist() == [0 + 1, 2 + 3 + 4, 5, 6 + 7, 8]
    assert sums.dtype == torch.float64
    (sums * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [1, 1, 2, 2, 2, 3, 4, 4, 5]


def test_moving_keeps_values_and_forgets_what_belongs_to_the_old_device() -> None:
    batch = build_micro_batch([TWO], [0], share_prompts=True)
    assert batch.to(torch.device("cpu")) is batch
    batch.layout.masks[(1, 1, None)] = torch.ones(1, 1)
    batch.layout.reached.add(1)
    moved = batch.to(torch.device("meta"))
    assert moved.input_ids_T.device.type == moved.pair_weight_B.device.type == "meta"
    assert moved.layout.cu_q.device.type == moved.layout.cu_k.device.type == "meta"
    assert moved.layout.kv_index_U is not None
    assert moved.layout.kv_index_U.device.type == "meta"
    assert moved.layout.masks == {}
    assert moved.layout.reached == set()
    assert moved.layout.q_lengths == batch.layout.q_lengths


# ---- a rank's share of a step


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("share", [True, False])
def test_all_ranks_together_score_every_completion_of_the_step_once(world_size: int, share: bool) -> None:
    dataset = {
        100 + i: TokenizedExample((i, i), tuple((i, k) for k in range(1 + i % 3)), (Pair(0, i % 3),), f"a:{i}")
        for i in range(5)
    }
    rows = [103, 100, 104, 101, 102]
    sizes = [ExampleSize(2, tuple(len(ids) for ids in dataset[row].completion_ids), dataset[row].pairs) for row in rows]
    plan = Packer(world_size, 16, 32, share).plan(0, rows, sizes)
    scored, weights = [], 0.0
    for rank in range(world_size):
        work = RankWork(plan, rank, dataset, share)
        for batches in (work.micro_batches(), work.reference_bins()):
            indices = torch.cat([batch.completion_index_C for batch in batches]).tolist()
            assert sorted(indices) == list(range(work.num_completions))
        targets = {}
        for batch in work.micro_batches():
            weights += float(batch.pair_weight_B.sum())
            for c, index in enumerate(batch.completion_index_C.tolist()):
                targets[index] = batch.target_ids_M[batch.completion_of_M == c].tolist()
        # The reference's answer of an index belongs to the same completion as the policy's.
        for batch in work.reference_bins():
            for c, index in enumerate(batch.completion_index_C.tolist()):
                assert batch.target_ids_M[batch.completion_of_M == c].tolist() == targets[index]
        # And a stored answer is found by the rows, in the order of the indices.
        of_rows = [list(ids) for row in work.rows for ids in work.dataset[row].completion_ids]
        assert of_rows == [targets[index] for index in range(work.num_completions)]
        scored += list(targets.values())
        assert [work.example(position) for position in plan.examples_of_rank(rank)] == [
            dataset[plan.examples[position]] for position in plan.examples_of_rank(rank)
        ]
    assert sorted(scored) == sorted(list(ids) for example in dataset.values() for ids in example.completion_ids)
    assert weights == plan.pair_weight


# ---- on its way to a device


def test_what_is_moved_together_keeps_values_and_types() -> None:
    tensors = [
        torch.tensor([1, -2, 2**40]),
        torch.tensor([0, 3, 7], dtype=torch.int32),
        torch.zeros(0, dtype=torch.int64),
        torch.tensor([0.5, -1e-30]),
    ]
    moved = batch_file._move_together(tensors, torch.device("cpu"))
    assert len(moved) == len(tensors)
    assert all(torch.equal(one, other) and one.dtype == other.dtype for one, other in zip(moved, tensors, strict=True))
    (storage,) = {tensor.untyped_storage().data_ptr() for tensor in moved if len(tensor)}
    assert storage not in {tensor.untyped_storage().data_ptr() for tensor in tensors}


def test_every_field_arrives_under_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device keeps no values: what is moved stays on the CPU here, and only the names are followed."""
    batch = build_micro_batch([TWO, ONE_TOKEN], [0, 2], share_prompts=True)
    monkeypatch.setattr(batch_file, "_move_together", lambda tensors, device: [tensor.clone() for tensor in tensors])
    moved = batch.to(torch.device("meta"))
    fields = 0
    for before, after in ((batch, moved), (batch.layout, moved.layout)):
        for name, value in vars(before).items():
            if isinstance(value, torch.Tensor):
                fields += 1
                assert torch.equal(getattr(after, name), value), name
                assert getattr(after, name) is not value
    assert fields == 16 + 6
    assert (moved.num_tokens, moved.layout.q_lengths) == (batch.num_tokens, batch.layout.q_lengths)
