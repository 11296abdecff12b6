"""What `benchmarks/trl` compares: operations in closed form, examples, and the switches of both sides. No TRL."""

import inspect
import json
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu_kit.observed import save_nothing
from benchmarks.trl.inputs import (
    DISTRIBUTIONS,
    Example,
    describe,
    padding,
    random_examples,
    read_examples,
    sort_by_length,
    write_rows,
)
from benchmarks.trl.operations import PASSES, Lengths, Shape, useful_flops
from benchmarks.trl.our_run import pack_nothing, widened
from benchmarks.trl.variants import DEFAULT, Task, Variant, our_config, their_settings, with_witnesses
from dpo_dist import packing, trainer
from dpo_dist.batch import build_micro_batch
from dpo_dist.cli import training
from dpo_dist.config import RunConfig
from dpo_dist.data import Pair
from dpo_dist.tokenization import TokenizedExample

TINY = {
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 8,
}

# ---- operations


def test_the_closed_form_is_what_torch_counts() -> None:
    """Under math attention torch counts the whole square of queries and keys, so that is the area here."""
    config = LlamaConfig(**TINY)
    model = LlamaForCausalLM(config)
    shape = Shape.of(config.to_dict())
    tokens, scored = 11, 4
    ids = torch.arange(tokens)[None]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        logits = model.lm_head(model.model(ids).last_hidden_state[:, :scored])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    expected = shape.forward(tokens, tokens**2, scored)
    assert forward.get_total_flops() == expected
    assert backward.get_total_flops() == 2 * expected


def test_the_area_is_what_causal_completions_see() -> None:
    lengths = Lengths(5, (4, 3, 1))
    seen = sum(range(1, 6))  # the prompt
    for completion in lengths.completions:
        seen += sum(5 + own for own in range(1, completion))  # the last token is no query
    assert lengths.area == seen
    assert (lengths.inputs, lengths.scored) == (5 + 3 + 2 + 0, 8)


def test_an_update_is_a_policy_forward_and_backward_and_a_reference_forward() -> None:
    shape = Shape.of({**TINY, "model_type": "llama"})
    one = Lengths(5, (4, 3))
    assert useful_flops(shape, [one, one]) == 2 * PASSES * shape.forward(one.inputs, one.area, one.scored)
    assert 3 * shape.forward(1, 0, 0) == 6 * shape.body  # 6 N for each token of the policy


def test_other_architectures_are_refused() -> None:
    with pytest.raises(ValueError, match="not of gpt2"):
        Shape.of({"model_type": "gpt2"})


# ---- examples


def example(prompt: int, *completions: int) -> Example:
    ids = tuple(tuple(range(100 * number, 100 * number + length)) for number, length in enumerate(completions, 1))
    pairs = tuple((a, b) for a in range(len(ids)) for b in range(a + 1, len(ids)))
    return Example(tuple(range(prompt)), ids, pairs)


def test_both_sides_are_given_the_same_pairs(tmp_path: Path) -> None:
    examples = [example(3, 2, 4), example(2, 5, 1), example(9, 2, 3)]
    write_rows(tmp_path, "file", examples)
    ours = tmp_path / "ours-file.jsonl"
    assert ours.read_text() == (tmp_path / "trl-file.jsonl").read_text()
    assert read_examples(str(ours), tmp_path, tmp_path / "cache", 100) == examples
    assert read_examples(str(ours), tmp_path, tmp_path / "cache", 8) == examples[:2]


def test_of_ranked_rows_all_pairs_are_unrolled_for_trl(tmp_path: Path) -> None:
    ranked = example(3, 2, 4, 1)
    write_rows(tmp_path, "file", [ranked])
    rows = [json.loads(line) for line in (tmp_path / "trl-file.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and all(row["prompt_ids"] == [0, 1, 2] for row in rows)
    (back,) = read_examples(str(tmp_path / "ours-file.jsonl"), tmp_path, tmp_path / "cache", 100)
    assert sorted(back.as_pairs(), key=str) == sorted(ranked.as_pairs(), key=str)


def test_ranked_rows_with_ties_are_left_out(tmp_path: Path) -> None:
    row = {"prompt_ids": [1, 2], "completions_ids": [[3], [4], [5]]}
    rows = [{**row, "scores": scores} for scores in ([2, 1, 0], [1, 1, 0])]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    assert len(read_examples(str(tmp_path / "rows.jsonl"), tmp_path, tmp_path / "cache", 100)) == 1


@pytest.mark.parametrize("distribution", [*DISTRIBUTIONS, "30,40"])
def test_random_examples_are_the_same_every_time(distribution: str) -> None:
    examples = random_examples(distribution, 50, 1000, 300)
    assert examples == random_examples(distribution, 50, 1000, 300)
    assert max(one.longest for one in examples) <= 300 and min(len(one.prompt) for one in examples) >= 8
    assert all(100 <= token < 1000 for one in examples for token in one.prompt)
    assert describe(examples)["pairs"] == 50


@pytest.mark.parametrize("distribution", ["unknown", "1,2", "30,40,50"])
def test_an_unknown_distribution_is_refused(distribution: str) -> None:
    with pytest.raises(ValueError):
        random_examples(distribution, 1, 1000, 300)


def test_the_order_of_lengths_leaves_the_warm_up_alone() -> None:
    examples = [example(prompt, 2, 3) for prompt in (1, 9, 2, 7, 5)]
    ordered = sort_by_length(examples, 2)
    assert [len(one.prompt) for one in ordered] == [1, 9, 7, 5, 2]


# ---- variants


def test_names_and_what_they_switch() -> None:
    assert Variant.named("ours-head-packing") == Variant("ours-head-packing", "ours", {"head", "packing"}, "file")
    assert Variant.named("trl+head+sorted") == Variant("trl+head+sorted", "trl", {"head"}, "sorted")
    assert Variant.named("ours+compile+sorted") == Variant("ours+compile+sorted", "ours", frozenset(), "sorted", True)
    assert Variant.named("trl+head+compile").switches == {"head"} and not Variant.named("trl+head").is_compiled
    assert "model.torch_compile=true" in Variant.named("ours-head+compile").meaning
    assert all(Variant.named(name).meaning for name in DEFAULT)
    for wrong in (
        "theirs",
        "ours+sorted+compile",
        "ours-compile",
        "ours+head",
        "trl-head",
        "ours-nothing",
        "trl+packing",
        "oursx",
    ):
        with pytest.raises(ValueError, match="is no variant"):
            Variant.named(wrong)


def test_the_witness_of_every_order_is_run() -> None:
    assert [one.name for one in with_witnesses(["trl", "trl+sorted", "trl"])] == [
        *("trl", "trl+sorted"),
        *("ours", "ours+sorted"),
    ]


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return Task("model", tmp_path, 3, 2, 12, 2, 1024, (900, 2000), "zero3_cpu")


def test_our_configurations_are_valid_and_differ_in_their_switch(task: Task, tmp_path: Path) -> None:
    def config(name: str, recompute: bool = True) -> RunConfig:
        return RunConfig(**our_config(task, Variant.named(name), recompute, tmp_path / "run"))

    assert config("ours").model.prefix_sharing == "on" and config("ours-sharing").model.prefix_sharing == "off"
    assert config("ours").packing.max_tokens == 1024 and config("ours-sharing").packing.max_tokens == 2000
    assert config("ours-reference").reference.per_microbatch and not config("ours").reference.per_microbatch
    assert config("ours+sorted").data.train[0].path.endswith("ours-sorted.jsonl")
    assert config("ours").model.gradient_checkpointing and not config("ours", False).model.gradient_checkpointing
    theirs = their_settings(task, Variant.named("trl+head"), False, tmp_path)
    ours, train = config("ours"), config("ours").train
    assert theirs["beta"] == ours.loss.beta and theirs["learning_rate"] == train.learning_rate
    assert theirs["max_grad_norm"] == train.max_grad_norm and train.weight_decay == 0 and not train.shuffle
    assert (train.adam_beta1, train.adam_beta2, train.adam_epsilon) == (0.9, 0.999, 1e-8)  # TRL's defaults
    assert theirs["completion_only_head"] and not theirs["gradient_checkpointing"] and not theirs["torch_compile"]
    assert their_settings(task, Variant.named("trl+compile"), False, tmp_path)["torch_compile"]
    assert config("ours+compile").model.torch_compile and not config("ours").model.torch_compile


def test_without_packing_every_example_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing.Packer, "plan", packing.Packer.plan)
    pack_nothing()
    sizes = [packing.ExampleSize(length, (3, 3), (Pair(0, 1),)) for length in (5, 9, 7)]
    plan = packing.Packer(1, 10_000, 10_000, True).plan(0, (0, 1, 2), sizes)
    assert plan.micro_batches == plan.reference_bins == (((1,), (2,), (0,)),)


def test_without_the_head_for_completions_every_token_is_scored() -> None:
    one = TokenizedExample((1, 2, 3), ((4, 5, 6), (7, 8)), (Pair(0, 1),), "x:1")
    batch = build_micro_batch([one], [0], True)
    wide = widened(batch)
    num_scored = len(batch.target_ids_M)
    assert set(wide.score_index_M.tolist()) == set(range(len(batch.input_ids_T)))
    assert wide.score_index_M[-num_scored:].equal(batch.score_index_M)
    assert wide.target_ids_M[-num_scored:].equal(batch.target_ids_M)
    assert len(wide.target_ids_M) == len(wide.score_index_M)


def test_what_saves_nothing_is_called_as_what_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = {"save": trainer.save, "export": training._export}
    monkeypatch.setattr(trainer, "save", trainer.save)
    monkeypatch.setattr(training, "_export", training._export)
    save_nothing()
    for name, replaced in (("save", trainer.save), ("export", training._export)):
        assert list(inspect.signature(replaced).parameters) == list(inspect.signature(stock[name]).parameters)


def test_padding_is_what_trl_computes_for_each_token_to_read() -> None:
    examples = [
        Example((1,) * prompt, ((2,) * a, (3,) * b), ((0, 1),)) for prompt, a, b in ((4, 3, 5), (1, 2, 2), (6, 6, 2))
    ]
    # The first two are a step: 4 rows of 9 tokens; read are 4 + 2 + 4 and 1 + 1 + 1. The third is no whole step.
    assert padding(examples, 2) == 36 / 13
