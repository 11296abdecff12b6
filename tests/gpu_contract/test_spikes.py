"""Thin proofs that the contract stays open for what is to come: sequence parallelism, mixtures of experts."""

import json
from itertools import count
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM
from typer.testing import CliRunner

from dpo_dist.cli import app
from dpo_dist.engine import TrainingEngine
from tests.forking import fork_ranks
from tests.golden.trajectories import base_config, load_rows
from tests.launching import succeeded

pytestmark = pytest.mark.thorough

EXPERTS, STEPS = 16, 2
ONE_EXAMPLE = 100  # tokens of a micro-batch, so that one rank has as many of them as two


def test_attention_split_over_heads_and_tokens_computes_the_same(tmp_path: Path) -> None:
    succeeded(fork_ranks(2, "tests.gpu_contract.ulysses_worker", str(tmp_path / "out"), cwd=tmp_path))
    ranks = [json.loads((tmp_path / f"out.rank{rank}.json").read_text()) for rank in (0, 1)]
    found = [rank["none"] for rank in ranks]
    for one in found:
        whole, part = one["tokens"]
        assert whole == 2 * part
        # The models' norms round to float32 inside.
        assert one["logps"] < 1e-5
        assert one["gradients"] < 1e-5
    assert all(one["scored"][0] > 0 for one in found)
    assert sum(one["scored"][0] for one in found) == found[0]["scored"][1]
    assert all(rank["heads on the wrong rank"]["logps"] > 0.1 for rank in ranks)
    assert all(rank["half a gradient"]["logps"] < 1e-5 < 0.01 < rank["half a gradient"]["gradients"] for rank in ranks)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=256, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=EXPERTS, num_experts_per_tok=1, initializer_range=0.2,
        max_position_embeddings=512,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(folder)
    return folder


def _losses(folder: Path, model: Path, name: str, num_ranks: int, stage: int) -> list[float]:
    config = base_config(folder / name)
    config["model"] |= {"model_name_or_path": str(model), "reference_name_or_path": None}
    config["train"] |= {"examples_per_step": 2, "max_steps": STEPS, "learning_rate": 1e-3, "self_check": False}
    config["packing"]["max_tokens"] = ONE_EXAMPLE
    config["parallel"] = {"deepspeed": f"zero{stage}_cpu"}
    config["log"] = {"report_to": []}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    arguments = ["train", str(folder / f"{name}.yaml")]
    if num_ranks == 1:
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
    else:
        succeeded(fork_ranks(num_ranks, "dpo_dist", *arguments, cwd=folder))
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "split" not in line]


def test_ranks_that_route_to_different_experts_train_as_one(
    tmp_path: Path, mixture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(mixture)
    used = []
    for row in load_rows()[:2]:  # one example for each rank
        logits = model(torch.tensor([[*row.prompt_ids, *row.chosen_ids]]), output_router_logits=True).router_logits
        used.append({int(expert) for expert in logits[0].argmax(-1)})
    assert used[0] != used[1] and all(len(experts) < EXPERTS for experts in used)
    split, whole = (_losses(tmp_path, mixture, f"ranks{n}", n, stage) for n, stage in ((2, 3), (1, 0)))
    assert len(split) == STEPS
    assert split == pytest.approx(whole, abs=1e-6)
    assert split[1] != split[0]

    # One rank alone whose every second micro-batch leaves no gradient, as if the other rank's were lost.
    stock, calls = TrainingEngine.backward, count()
    monkeypatch.setattr(TrainingEngine, "backward", lambda self, loss: stock(self, loss * (1 - next(calls) % 2)))
    lost = _losses(tmp_path, mixture, "lost", 1, 0)
    assert next(calls) == 2 * STEPS
    assert lost[0] == pytest.approx(whole[0], abs=1e-6)
    assert abs(lost[1] - whole[1]) > 1e-4
