"""Adapters through the package's engine against plain torch and plain PEFT: every kind, ZeRO-0 to 3, one and two ranks.

Losses and gradient norms agree to float32 rounding. A weight whose gradient is near zero is moved by AdamW as far as
any other, so rounding shows more in weights: those are held to 1e-4 of the largest one of their tensor.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dpo_dist.attention import register
from dpo_dist.batch import build_micro_batch
from dpo_dist.checkpoint import export_merged
from dpo_dist.model import load_config, load_model
from tests.launching import launch, succeeded
from tests.parity import adapter_oracle
from tests.parity.adapter_cases import CASES, NO_MERGE, STARTS, examples_of_step, save_base, save_start
from tests.tiny_engine import QUIET

# PEFT does not know its own rank pattern again.
RANKS = "ignore:The following rank_pattern keys:RuntimeWarning"
pytestmark = [pytest.mark.timeout(600), *(pytest.mark.filterwarnings(rule) for rule in (*QUIET, RANKS))]

RELATIVE, WEIGHTS = 1e-5, 1e-4
ON_ONE = (
    *(f"{name}:3" for name in ("rslora", "tied_embedding", "continued_dora", "prompt_tuning")),
    *(f"{name}:0" for name in ("lora", "dora", "saved_modules", "prefix_tuning", "p_tuning", "continued_prompt")),
    "adalora:0:resume",
)
ON_TWO = (
    *(f"{name}:3" for name in ("dora", "tied_both", "prefix_tuning", "p_tuning", "continued", "continued_prompt")),
    *("lora:1", "lora:2:resume", "saved_modules:3:resume", "adalora:1", "adalora:2", "adalora:3:resume"),
)
POINTS = [
    *((1, *case.split(":")[:2]) for case in ON_ONE),
    *((2, *case.split(":")[:2]) for case in ON_TWO),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    save_base(folder / "base", tied=False)
    save_base(folder / "tied", tied=True)
    for name in STARTS:
        save_start(folder, name)
    for count, cases in ((1, ON_ONE), (2, ON_TWO)):
        succeeded(launch(count, "tests.parity.adapter_worker", str(folder), *cases, cwd=folder, timeout=500))
    return folder


@pytest.fixture(scope="module")
def oracles(folder: Path) -> dict[str, tuple[list[dict[str, float]], Any]]:
    torch.set_num_threads(1)
    return {name: adapter_oracle.train(case, folder) for name, case in CASES.items()}


def outcome(folder: Path, ranks: int, name: str, stage: str) -> tuple[Path, dict[str, Any]]:
    out = folder / f"ranks{ranks}" / f"{name}-zero{stage}"
    return out, json.loads((out / "result.json").read_text())


@pytest.mark.parametrize(("ranks", "name", "stage"), POINTS)
def test_training_follows_plain_peft(folder, oracles, ranks, name, stage):
    out, result = outcome(folder, ranks, name, stage)
    history, model = oracles[name]
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


@pytest.mark.parametrize(("ranks", "name", "stage"), POINTS)
def test_the_reference_stays_while_the_policy_moves(folder, ranks, name, stage):
    out, result = outcome(folder, ranks, name, stage)
    assert result["reference_kept"] and result["moved"] > 1e-3
    assert result["same_flags"] and result["dtypes"] == ["torch.float32"]
    if name.startswith("continued") or not CASES[name].adapter["peft_type"].endswith("tuning"):
        assert result["started_equal"] == 0.0
    if CASES[name].start is None:
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


@pytest.mark.parametrize(("ranks", "name", "stage"), POINTS)
def test_the_exported_adapter_is_the_policy_in_plain_peft(folder, ranks, name, stage):
    out, _ = outcome(folder, ranks, name, stage)
    base = adapter_oracle.plain(folder / CASES[name].base)
    loaded = PeftModel.from_pretrained(base, str(out / "adapter"), autocast_adapter_dtype=False)
    assert torch.allclose(plain_answer(loaded), load_file(out / "probe.safetensors")["policy"], rtol=0, atol=1e-4)
    settings = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(folder / CASES[name].base) and settings["inference_mode"]
    assert not list(out.glob(".tmp*"))


@pytest.mark.parametrize(("ranks", "name", "stage"), [point for point in POINTS if point[1] not in NO_MERGE])
def test_the_merged_model_is_the_policy_in_plain_transformers(folder, tmp_path, ranks, name, stage):
    out, _ = outcome(folder, ranks, name, stage)
    base = folder / CASES[name].base
    merged = export_merged(base, out / "adapter", tmp_path / "merged", torch.float32)
    keys = load_file(merged / "model.safetensors").keys()
    untied = name in ("tied_both", "tied_embedding")
    expected = load_file(base / "model.safetensors").keys() | ({"lm_head.weight"} if untied else set())
    assert keys == expected
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert model.config.tie_word_embeddings is False
    assert torch.allclose(plain_answer(model), load_file(out / "probe.safetensors")["policy"], rtol=0, atol=2e-4)


def test_the_case_has_what_it_is_about(oracles):
    history, model = oracles["adalora"]
    assert any(step["grad_norm"] > CASES["adalora"].max_norm for step in history), "clipping must be at work"
    pattern = model.peft_config["default"].rank_pattern
    ranks = [sum(rows) for rows in pattern.values()]
    assert sum(ranks) == 2 * len(ranks) and len(set(ranks)) > 1, "ranks must have been taken away unevenly"
    assert any(step["grad_norm"] > CASES["lora"].max_norm for step in oracles["lora"][0])
