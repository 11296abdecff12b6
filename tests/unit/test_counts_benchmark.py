"""The arithmetic of benchmarks/counts: every assumption on lengths that can be counted by hand; and the command."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from transformers import LlamaConfig

from benchmarks.counts.counting import (
    OURS,
    SYSTEMS,
    Model,
    count,
    layouts_of,
    moved_bytes,
    moved_elements,
    policy_operations,
    reference_operations,
)
from benchmarks.counts.layouts import (
    Layout,
    Setting,
    all_positions,
    cut,
    dealt,
    filled,
    filled_by_branch,
    largest_batch,
    packed,
    packed_all_logits,
    packed_by_branch,
    padded,
    single_pairs,
    trl,
    trl_sorted,
    whole_rows,
)
from benchmarks.counts.lengths import PAPER, Spread, drawn, of_medians
from benchmarks.counts.page import summary, table
from benchmarks.counts.shapes import SHAPES, Shape
from benchmarks.reference_traffic.__main__ import EXPECTED
from benchmarks.trl import operations
from dpo_dist.data import Pair
from dpo_dist.errors import ConfigError
from dpo_dist.packing import AttentionCost, CostModel, ExampleSize
from tests.launching import REPOSITORY, environment

ENDS = (Pair(0, 1),)
SHORT, LONG = ExampleSize(4, (2, 3), ENDS), ExampleSize(10, (6, 1), ENDS)
RANKED = ExampleSize(5, (1, 2, 3), (Pair(2, 1), Pair(2, 0), Pair(1, 0)))
# 10 operations of a token, 1 of a key, 100 of a scored token.
COST = CostModel(10.0, (AttentionCost(None, 1.0),), 100.0)


def _tokens(rows: list[ExampleSize] | Layout) -> int:
    sizes = rows.rows if isinstance(rows, Layout) else rows
    return sum(size.input_tokens(False) for size in sizes)


def _scored(layout: Layout) -> int:
    return sum(sum(size.completions) for size in layout.scored)


# ---- assumptions about others, one by one


def test_every_pair_has_a_prompt_of_its_own() -> None:
    pairs = single_pairs([SHORT, RANKED])
    assert [(pair.prompt, pair.completions) for pair in pairs] == [(4, (2, 3)), (5, (3, 2)), (5, (3, 1)), (5, (2, 1))]
    assert sum(pair.unshared_tokens for pair in pairs) == SHORT.unshared_tokens + RANKED.unshared_tokens


def test_ranks_get_pairs_in_turn_and_cut_them_by_number() -> None:
    pairs = [ExampleSize(length, (1, 1), ENDS) for length in (1, 2, 3, 4, 5)]
    assert [[pair.prompt for pair in share] for share in dealt(pairs, 2)] == [[1, 3, 5], [2, 4]]
    assert [[pair.prompt for pair in batch] for batch in cut(pairs, 2)] == [[1, 2], [3, 4], [5]]


def test_the_largest_batch_holds_any_pairs_of_the_data() -> None:
    """The longest row has 16 tokens: two of them for each pair."""
    assert [largest_batch([SHORT, LONG], budget) for budget in (96, 95, 32, 8)] == [3, 2, 1, 1]


def test_rows_are_padded_to_the_longest_of_the_micro_batch() -> None:
    assert _tokens(padded([SHORT, LONG])) == 2 * 2 * 16
    assert _tokens(padded([SHORT])) == 2 * 7


def test_micro_batches_are_filled_in_order() -> None:
    """Both rows together: 13 and 27 tokens. The longer branch: 7 and 16."""
    pairs = [SHORT, LONG, SHORT]
    assert [len(batch) for batch in filled(pairs, 40)] == [2, 1]
    assert [len(batch) for batch in filled(pairs, 53)] == [3]
    assert [len(batch) for batch in filled(pairs, 1)] == [1, 1, 1]
    # Chosen rows have 6, 16 and 6 tokens, rejected ones 7, 11 and 7: 28 and 25 together.
    assert [len(batch) for batch in filled_by_branch(pairs, 56)] == [3]
    assert [len(batch) for batch in filled_by_branch(pairs, 55)] == [2, 1]
    assert [len(batch) for batch in filled_by_branch(pairs, 1)] == [1, 1, 1]


def test_others_compute_whole_rows() -> None:
    assert _tokens([whole_rows(SHORT)]) == 6 + 7
    assert sum(all_positions(SHORT).completions) == 6 + 7


# ---- systems


def test_trl_pads_what_meets_and_scores_completions() -> None:
    setting = Setting(ranks=2, max_tokens=64, reference_max_tokens=128, batch=2)
    layout = trl([SHORT, SHORT, LONG, LONG], setting)  # each rank has a short and a long pair
    assert (_tokens(layout), _scored(layout), layout.slots, layout.reference_slots) == (2 * 2 * 2 * 16, 24, 1, 1)
    assert _tokens(list(layout.attended)) == 2 * (13 + 27)
    layout = trl_sorted([SHORT, LONG, SHORT, LONG], setting)
    assert (_tokens(layout), _scored(layout), layout.slots) == (2 * 2 * 7 + 2 * 2 * 16, 24, 1)
    assert trl([SHORT] * 6, setting).slots == 2  # three pairs of each rank


def test_packed_systems_copy_prompts_and_differ_in_the_head() -> None:
    setting = Setting(ranks=1, max_tokens=40, reference_max_tokens=80, batch=1)
    found = [system([SHORT, LONG], setting) for system in (packed, packed_all_logits, packed_by_branch)]
    assert [_tokens(layout) for layout in found] == [40, 40, 40]
    assert [_scored(layout) for layout in found] == [12, 40, 40]
    assert [layout.slots for layout in found] == [1, 1, 2]  # by branch 22 of at most 20 tokens
    assert all(layout.keeps_logits for layout in found)


def test_ours_computes_a_prompt_and_a_completion_once() -> None:
    setting = Setting(ranks=1, max_tokens=15, reference_max_tokens=30, batch=1)
    layout = layouts_of([SHORT, RANKED], setting, COST)["ours"]
    assert sum(row.input_tokens(layout.share_prompts) for row in layout.rows) == (4 + 5 - 2) + (5 + 6 - 3)
    assert (_scored(layout), layout.slots, layout.reference_slots) == (5 + 6, 1, 1)
    layout = layouts_of([SHORT, RANKED], replace(setting, max_tokens=8, reference_max_tokens=16), COST)["ours"]
    assert (layout.slots, layout.reference_slots) == (2, 1)


# ---- operations and bytes


def test_operations_that_are_added_up_by_hand() -> None:
    rows, scored = [ExampleSize(0, (4,), ())], [ExampleSize(0, (2,), ())]  # three tokens see 6 keys
    layout = Layout(rows, rows, scored, slots=1, reference_slots=1)
    assert reference_operations(layout, COST) == 30 + 6 + 200
    assert policy_operations(layout, COST) == 3 * 36 + 4 * 200
    assert policy_operations(layout, replace(COST, recomputed=1.0)) == 4 * 36 + 4 * 200
    assert policy_operations(replace(layout, keeps_logits=True), COST) == 3 * 36 + 3 * 200


@pytest.mark.parametrize("recomputed", [0.0, 1.0])
def test_ours_are_the_packers_own_operations(recomputed: float) -> None:
    cost = replace(COST, recomputed=recomputed)
    sizes = [SHORT, LONG, RANKED]
    layout = layouts_of(sizes, Setting(2, 100, 200, 1), cost)["ours"]
    assert policy_operations(layout, cost) == pytest.approx(cost.training(sizes, share_prompt=True).sum())
    assert reference_operations(layout, cost) == pytest.approx(cost.forward(sizes, share_prompt=True).sum())


def test_elements_are_those_that_reference_traffic_measures() -> None:
    for g in (1, 2, 4):
        assert moved_elements(g, g) == EXPECTED["per micro-batch"](g)
        assert moved_elements(g, 1) == EXPECTED["once for a step"](g)
        assert moved_elements(g, 0) == EXPECTED["cached"](g)


def test_a_rank_moves_all_but_its_own_part() -> None:
    # Two gathers and a reduction of the policy, one gather of the reference.
    assert moved_bytes(1000, 4, 1, 1, gradient_bytes=2) == 1000 * (2 + 2 + 2 + 2) * 3 / 4
    assert moved_bytes(1000, 4, 2, 1, gradient_bytes=4) == 1000 * (2 * (2 + 2 + 4) + 2) * 3 / 4


@pytest.mark.parametrize(("name", "parameters"), [("8B", 8_030_261_248), ("70B", 70_553_706_496)])
def test_shapes_have_as_many_weights_as_is_published(name: str, parameters: int) -> None:
    assert SHAPES[name].parameters == parameters


def test_a_shapes_cost_is_the_other_closed_form() -> None:
    shape = Shape("small", hidden=64, layers=3, heads=4, intermediate=128, key_heads=2, vocabulary=512)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128,
        num_key_value_heads=2,
    )  # fmt: skip
    expected = operations.Shape.of(config.to_dict()).forward(tokens=7, area=4 * 6 // 2 + 4 * 5 // 2, scored=5)
    one = ExampleSize(4, (1, 1), ENDS)
    cost = shape.cost(recomputes=True)
    assert cost.recomputed == 1.0 and shape.cost(recomputes=False).recomputed == 0.0
    body = cost.per_token * 7 + cost.per_scored_token * 5 + cost.attention[0].per_key * 22
    assert body == expected
    assert one.input_tokens(True) == 4


# ---- all together


def _counted(gradient_bytes: int | None = None) -> dict:
    small = Model.of(Shape("small", 64, 2, 4, 128, key_heads=2, vocabulary=512), recomputes=True)
    setting = Setting(ranks=2, max_tokens=60, reference_max_tokens=120, batch=largest_batch([SHORT, LONG], 60))
    return dict(count([[SHORT, LONG] * 4, [LONG, RANKED]], setting, [small], gradient_bytes))


def test_a_cache_saves_a_forward_from_the_second_epoch_on() -> None:
    found = _counted(gradient_bytes=2)
    assert list(found) == [system.name for system in SYSTEMS]
    first, later = found["ours, cached, epoch 1"], found["ours, cached, later epochs"]
    assert first == found[OURS]
    assert later.operations[0] == pytest.approx(first.operations[0] * 4 / 5, rel=1e-9)  # recomputation on
    assert later.elements == 3 * later.slots
    assert (found["TRL"].elements, found[OURS].tokens < found["packed (ms-swift)"].tokens) == (
        4 * found["TRL"].slots, True,
    )  # fmt: skip


def test_gradients_are_reduced_as_each_does_it_by_default() -> None:
    default, equal = _counted(), _counted(gradient_bytes=2)
    assert default["TRL"] == equal["TRL"]
    assert default[OURS].traffic[0] > equal[OURS].traffic[0]
    assert default[OURS].elements == equal[OURS].elements


def test_tables_have_a_row_for_every_system() -> None:
    found = _counted()
    lines = table(found, ["small"]).splitlines()
    assert len(lines) == 2 + len(SYSTEMS) and len({line.count("|") for line in lines}) == 1
    assert "| 1.00 |" in lines[2 + [system.name for system in SYSTEMS].index(OURS)]
    lines = summary({("a", 8): found}, "small").splitlines()[2:]
    assert len(lines) == 3 and len({line.count("|") for line in lines}) == 1
    assert lines[-1].startswith("| a | 8 | ")


# ---- lengths


def test_drawn_lengths_have_the_medians_that_were_asked_for() -> None:
    sizes = drawn(409, 0.42, Spread(rows=4000))
    prompts, chosen = [size.prompt for size in sizes], [size.completions[0] for size in sizes]
    assert np.median(prompts) == pytest.approx(409 * 0.42 / 1.42, rel=0.05)
    assert np.median(chosen) == pytest.approx(409 / 1.42, rel=0.05)
    assert sizes == drawn(409, 0.42, Spread(rows=4000))
    assert max(size.prompt + max(size.completions) for size in drawn(900, 2, Spread(longest=1000, rows=50))) <= 1000


def test_medians_are_a_name_or_two_numbers() -> None:
    spread = Spread(rows=5)
    assert of_medians("ultrafeedback", spread, 8192).sizes == of_medians("medians:409,0.42", spread, 8192).sizes
    assert all(of_medians(name, spread, 8192).reference_max_tokens == 16384 for name in PAPER)
    for wrong in ("medians:", "medians:3", "medians:0,1", "medians:a,b"):
        with pytest.raises(ConfigError, match="medians:LENGTH,RATIO"):
            of_medians(wrong, spread, 8192)
    with pytest.raises(ConfigError, match="longest=100"):
        of_medians("capybara", Spread(longest=100), 8192)


def test_the_command_prints_tables_of_a_users_run_and_of_medians(tmp_path: Path) -> None:
    row = {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9, 2], "rejected_ids": [10, 2]}
    (tmp_path / "pairs.jsonl").write_text((json.dumps(row) + "\n") * 3, encoding="utf-8")
    values = {
        "model": {"model_name_or_path": str(REPOSITORY / "tests" / "golden" / "tiny_policy"), "dtype": "float32"},
        "data": {"train": [{"path": str(tmp_path / "pairs.jsonl")}]},
        "train": {"output_dir": str(tmp_path / "out"), "examples_per_step": 2, "max_steps": 2},
        "parallel": {"deepspeed": "zero0_cpu"},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks.counts", "mine.yaml", "tldr", "packing.max_tokens=500", "--rows", "50"]
    settings = environment({"DPO_DIST_CACHE": str(tmp_path / "cache")})
    done = subprocess.run(
        [*command, "--steps", "2", "--examples", "8", "--ranks", "2", "--model", "8B"],
        cwd=tmp_path, env=settings, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "mine: 3 examples, 3 pairs; 8 examples a step on 2 ranks, micro-batches of 500 tokens, TRL" in done.stdout
    assert "'s of 41 pairs; 2 steps; recomputation on" in done.stdout
    assert "tldr: 50 examples, 50 pairs" in done.stdout
    # Whole rows of 6 and 5 tokens; ours has the prompt once, and no last tokens: 3 + 2 + 1.
    assert "| packed (ms-swift) | 11 | 5 |" in done.stdout
    assert "| ours | 6 | 5 |" in done.stdout
    assert "| mine | 8 | " in done.stdout and "| tldr | 8 | " in done.stdout


def test_a_mistake_is_said_without_a_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.counts", "medians:3"],
        cwd=tmp_path, env=environment({}), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: medians:3 is not medians:LENGTH,RATIO") and "Traceback" not in done.stderr
