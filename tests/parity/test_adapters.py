"""Adapters through the package's engine against plain torch and plain PEFT: every kind, ZeRO-0 to 3, one and two ranks.

Losses and gradient norms agree to float32 rounding; weights to 2e-5 of the largest one of their tensor.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dpo_dist.adapters import export_adapter_checkpoint, export_merged
from dpo_dist.attention.interface import register
from dpo_dist.batch import build_micro_batch
from dpo_dist.checkpoint.saved_states import full_parameters
from dpo_dist.model import load_model
from dpo_dist.pretrained import load_config
from tests.forking import fork_ranks
from tests.launching import succeeded
from tests.parity import adapter_oracle
from tests.parity.adapter_cases import CASES, NO_MERGE, STARTS, examples_of_step, save_base, save_start
from tests.parity.oracle import naive_statistics
from tests.tiny_engine import QUIET

# PEFT does not know its own rank pattern again.
RANKS = "ignore:The following rank_pattern keys:RuntimeWarning"
pytestmark = [pytest.mark.timeout(600), *(pytest.mark.filterwarnings(rule) for rule in (*QUIET, RANKS))]

RELATIVE, WEIGHTS = 1e-5, 2e-5
# Ranks, whether it is run by hand only, and the cases of one launch.
LAUNCHES = {
    "one": (
        1,
        False,
        "rslora:3 tied_embedding:3 tied_both:3 continued:3 continued_dora:3 prompt_tuning:3 prefix_tuning:3 p_tuning:3 "
        "lora:0 adalora:0:resume",
    ),
    "two": (
        2,
        False,
        "dora:3 four_bits:3 saved_modules:3:resume adalora:3:resume",
    ),
    "one_more": (
        1,
        True,
        "dora:0 saved_modules:0 prefix_tuning:0 p_tuning:0 prompt_tuning:0 continued_prompt:0 four_bits:0 dora:1 "
        "p_tuning:2:resume",
    ),
    "two_more": (
        2,
        True,
        "lora:1 lora:2:resume tied_both:3 prefix_tuning:3 continued:3 continued_prompt:3 adalora:1 "
        "adalora:2 rslora:0 p_tuning:1 p_tuning:3",
    ),
}
POINTS = [
    pytest.param(launch_name, *case.split(":")[:2], marks=[pytest.mark.slow] if by_hand else [])
    for launch_name, (_, by_hand, cases) in LAUNCHES.items()
    for case in cases.split()
]
RESUMED = [
    pytest.param(name, *case.split(":")[:2], marks=[pytest.mark.slow] if by_hand else [])
    for name, (_, by_hand, cases) in LAUNCHES.items()
    for case in cases.split()
    if case.endswith(":resume")
]
MERGED = [point for point in POINTS if point.values[1] not in NO_MERGE]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    save_base(folder / "base", tied=False)
    save_base(folder / "tied", tied=True)
    for name in STARTS:
        save_start(folder, name)
    torch.set_num_threads(1)
    return folder


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Callable[[str], tuple[list[dict[str, float]], Any]]:
    return functools.cache(lambda name: adapter_oracle.train(CASES[name], folder))


@pytest.fixture(scope="module")
def outcome(folder: Path) -> Callable[[str, str, str], tuple[Path, dict[str, Any]]]:
    """The folder and results of one case; whoever asks first waits for its launch."""

    @functools.cache
    def launched(name: str) -> Path:
        count, _, cases = LAUNCHES[name]
        arguments = (str(folder), str(folder / name), *cases.split())
        succeeded(fork_ranks(count, "tests.parity.adapter_worker", *arguments, cwd=folder, timeout=500))
        return folder / name

    def find(name: str, case: str, stage: str) -> tuple[Path, dict[str, Any]]:
        out = launched(name) / f"{case}-zero{stage}"
        return out, json.loads((out / "result.json").read_text())

    return find


@pytest.mark.parametrize(("launched", "name", "stage"), POINTS)
def test_training_follows_plain_peft(outcome, oracle, launched, name, stage):
    out, result = outcome(launched, name, stage)
    history, model = oracle(name)
    for ours, theirs in zip(result["steps"], history, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=RELATIVE)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=RELATIVE)
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    written = load_file(out / "adapter" / "adapter_model.safetensors")
    assert written.keys() == expected.keys()
    for key, tensor in expected.items():
        assert written[key].shape == tensor.shape and written[key].dtype == torch.float32
        scale = float(tensor.abs().max()) if tensor.numel() else 1.0
        assert torch.allclose(written[key], tensor, rtol=0, atol=WEIGHTS * max(scale, 1e-3)), key


@pytest.mark.parametrize(("launched", "name", "stage"), POINTS)
def test_the_reference_stays_while_the_policy_moves(folder, outcome, launched, name, stage):
    out, result = outcome(launched, name, stage)
    assert result["reference_kept"] and result["moved"] > 1e-3
    assert result["same_flags"] and result["dtypes"] == ["torch.float32"]
    if name.startswith("continued") or not CASES[name].adapter["peft_type"].endswith("tuning"):
        assert result["started_equal"] == 0.0
    if CASES[name].start is None and CASES[name].quantised is None:
        assert torch.equal(load_file(out / "probe.safetensors")["reference"], base_answer(folder / CASES[name].base))


def base_answer(base: Path) -> torch.Tensor:
    """What the bare model answers, through the package's own forward."""
    config = load_config(base, trust_remote_code=False)
    model = load_model(base, config, register("sdpa"), torch.float32, {}, False, False)
    with torch.no_grad():
        return model(build_micro_batch(examples_of_step(99), [0, 2, 5, 7], True))


def plain_answer(model: Any) -> torch.Tensor:
    """The same tokens, one sequence at a time, by whatever plain model."""
    with torch.no_grad():
        return torch.cat(
            [
                adapter_oracle.token_logps(model.eval(), example.prompt_ids, ids)
                for example in examples_of_step(99)
                for ids in example.completion_ids
            ]
        )


def plain_statistics(model: Any) -> torch.Tensor:
    """Those of the same tokens."""
    with torch.no_grad():
        return torch.cat(
            [
                naive_statistics(adapter_oracle.token_logits(model, example.prompt_ids, ids), torch.tensor(ids))
                for example in examples_of_step(99)
                for ids in example.completion_ids
            ],
            dim=1,
        )


@pytest.mark.parametrize(("launched", "name", "stage"), POINTS)
def test_the_exported_adapter_is_the_policy_in_plain_peft(folder, outcome, launched, name, stage):
    out, _ = outcome(launched, name, stage)
    base = adapter_oracle.plain(folder / CASES[name].base, CASES[name].quantised)
    loaded = PeftModel.from_pretrained(base, str(out / "adapter"), autocast_adapter_dtype=False)
    assert torch.allclose(plain_answer(loaded), load_file(out / "probe.safetensors")["policy"], rtol=0, atol=1e-4)
    statistics = load_file(out / "probe.safetensors")["statistics"]
    assert torch.allclose(plain_statistics(loaded), statistics, rtol=0, atol=1e-4)
    settings = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(folder / CASES[name].base) and settings["inference_mode"]
    assert not list(out.glob(".tmp*"))


@pytest.mark.parametrize(("launched", "name", "stage"), MERGED)
def test_the_merged_model_is_the_policy_in_plain_transformers(folder, outcome, tmp_path, launched, name, stage):
    out, _ = outcome(launched, name, stage)
    base = folder / CASES[name].base
    merged = export_merged(base, out / "adapter", tmp_path / "merged", torch.float32)
    keys = load_file(merged / "model.safetensors").keys()
    untied = name in ("tied_both", "tied_embedding")
    expected = load_file(base / "model.safetensors").keys() | ({"lm_head.weight"} if untied else set())
    assert keys == expected
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert model.config.tie_word_embeddings is False
    assert torch.allclose(plain_answer(model), load_file(out / "probe.safetensors")["policy"], rtol=0, atol=2e-4)


@pytest.mark.parametrize(("launched", "name", "stage"), RESUMED)
def test_a_checkpoint_holds_the_adapter_and_nothing_else(folder, outcome, tmp_path, launched, name, stage):
    out, _ = outcome(launched, name, stage)
    checkpoint = next((out / "run").glob("**/step-*"))
    export_adapter_checkpoint(checkpoint, tmp_path / "adapter")
    live, offline = (load_file(path / "adapter_model.safetensors") for path in (out / "adapter", tmp_path / "adapter"))
    assert live.keys() == offline.keys() and all(torch.equal(live[key], offline[key]) for key in live)
    settings = [(path / "adapter_config.json").read_text() for path in (out / "adapter", tmp_path / "adapter")]
    assert settings[0] == settings[1]
    trained = {name.removeprefix("model.") for name in json.loads((out / "result.json").read_text())["trained"]}
    assert {name for name, tensor in full_parameters(checkpoint, torch.float32)} == trained


def test_four_bits_are_merged_into_the_whole_base(folder, outcome, tmp_path):
    out, _ = outcome("two", "four_bits", "3")
    merged = AutoModelForCausalLM.from_pretrained(
        export_merged(folder / "base", out / "adapter", tmp_path / "merged", torch.float32)
    )
    whole = PeftModel.from_pretrained(adapter_oracle.plain(folder / "base"), str(out / "adapter"))
    assert torch.allclose(plain_answer(merged), plain_answer(whole), rtol=0, atol=1e-4)
    assert not torch.allclose(
        plain_answer(merged), load_file(out / "probe.safetensors")["policy"], rtol=0, atol=1e-2
    ), "four bits must make a difference"


@pytest.mark.parametrize(("launched", "name", "stage"), [point for point in POINTS if point.values[1] == "adalora"])
def test_ranks_are_told_by_the_same_averages(outcome, oracle, launched, name, stage):
    """Of |value * gradient|, with the gradient as it was clipped."""
    out, _ = outcome(launched, name, stage)
    _, model = oracle(name)
    averages = load_file(out / "averages.safetensors")
    assert len(averages) == 2 * len(model.averages)
    for key, tensor in model.averages.items():
        assert torch.allclose(averages[f"ipt.{key}"], tensor, rtol=1e-4, atol=1e-5 * float(tensor.max())), key


def test_the_case_has_what_it_is_about(oracle):
    history, model = oracle("adalora")
    assert any(step["grad_norm"] > CASES["adalora"].max_norm for step in history), "clipping must be at work"
    pattern = model.peft_config["default"].rank_pattern
    ranks = [sum(rows) for rows in pattern.values()]
    assert sum(ranks) == 2 * len(ranks) and len(set(ranks)) > 1, "ranks must have been taken away unevenly"
    assert any(step["grad_norm"] > CASES["lora"].max_norm for step in oracle("lora")[0])
