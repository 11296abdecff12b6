"""Models that every rank reads slice by slice under ZeRO-3, against a plain `from_pretrained`."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dpo_dist.attention.interface import register
from dpo_dist.errors import ModelError
from dpo_dist.model import load_model, slices
from dpo_dist.model.slices import can_read_slices, elements
from dpo_dist.pretrained import load_config
from tests.launching import environment
from tests.parity.test_architectures import CASES, build
from tests.tiny_engine import QUIET, only_rank

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]

# Neither 3 nor 5 ranks divide the models' sizes, so the last slice is short or empty.
EVERY_ARCHITECTURE = "architectures:bfloat16:3:2"
EVERY_FORM = ("forms:float32:1:0", "forms:float32:3:1", "forms:float32:5:4", "forms:bfloat16:5:0")
# Their files have other names than the model computes with, or keep experts apart.
BY_TRANSFORMERS = frozenset(
    "deepseek_v2 deepseek_v3 glm4_moe gpt_neox granitemoe mixtral olmoe qwen2_moe qwen3_moe".split()
)
FORMS = ("tied", "several_files", "bfloat16_files", "odd_sizes")


# Two small gathers: whether all ranks went well. No weight is sent.
AS_PLAIN = {"sliced": True, "sent": {"c10d.allgather_": 2}, "differing": [], "generation": True}


def save(folder: Path, model_type: str = "llama", dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    """A tiny model as save_pretrained writes it, every weight random."""
    case = CASES[model_type]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(build(model_type, **(case.shape | case.features | settings)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("slices")
    for model_type in CASES:
        save(folder / "architectures" / model_type, model_type)
    save(folder / "forms/tied", tie_word_embeddings=True)
    save(folder / "forms/bfloat16_files", dtype=torch.bfloat16)
    save(folder / "forms/odd_sizes", vocab_size=61, hidden_size=28, head_dim=6, intermediate_size=47)
    several = save(folder / "forms/several_files")
    AutoModelForCausalLM.from_pretrained(several).save_pretrained(several, max_shard_size="10KB")
    (several / "model.safetensors").unlink(missing_ok=True)
    assert len(list(several.glob("*.safetensors"))) > 5
    # Some folders hold the same weights once more, under other names: not to be read.
    save_file({"model.norm.weight": torch.zeros(32)}, several / "consolidated.safetensors")
    worker = [sys.executable, "-m", "tests.processes.slices_worker", str(folder), EVERY_ARCHITECTURE, *EVERY_FORM]
    variables = environment({"DS_ACCELERATOR": "cpu"})
    done = subprocess.run(worker, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("model_type", CASES)
def test_a_rank_holds_its_slices_of_every_architecture(results: dict[str, dict[str, Any]], model_type: str) -> None:
    tied = build(model_type, **CASES[model_type].shape).tie_word_embeddings
    expected = {"sliced": False} if model_type in BY_TRANSFORMERS else {**AS_PLAIN, "tied": tied}
    assert results[EVERY_ARCHITECTURE][model_type] == expected


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", EVERY_FORM)
def test_every_form_of_files_gives_every_rank_its_slices(
    results: dict[str, dict[str, Any]], form: str, case: str
) -> None:
    assert results[case][form] == {**AS_PLAIN, "tied": form == "tied"}


# ---- what is not read slice by slice


def _can(folder: Path, **zero: Any) -> bool:
    config = load_config(folder, trust_remote_code=False)
    return can_read_slices(folder, config, {"zero_optimization": {"stage": 3, **zero}}, trust_remote_code=False)


def test_ranks_that_hold_more_or_other_than_a_slice_leave_it_to_transformers(tmp_path: Path) -> None:
    folder = save(tmp_path / "llama")
    assert _can(folder)
    assert _can(folder, offload_param={"device": "cpu"})
    assert not _can(folder, offload_param={"device": "nvme"})
    assert not _can(folder, zero_quantized_nontrainable_weights=True)


def test_files_that_are_not_the_model_as_it_is_leave_it_to_transformers(tmp_path: Path) -> None:
    folder = save(tmp_path / "llama", tie_word_embeddings=True)
    path = folder / "model.safetensors"
    whole = load_file(path)
    norm = whole["model.norm.weight"]
    for changes in (
        {"model.norm.weight": None},
        {"model.norm.weight": torch.cat([norm, norm])},
        {"lm_head.weight": whole["model.embed_tokens.weight"].clone()},  # tied, and there twice
        {"model.norm.weight": None, "norm.weight": norm},
    ):
        changed = {name: tensor for name, tensor in (whole | changes).items() if tensor is not None}
        save_file(changed, path, metadata={"format": "pt"})
        assert not _can(folder), changes
    save_file(whole | {"model.unknown": norm.clone()}, path, metadata={"format": "pt"})
    assert _can(folder)  # as transformers does: what the model does not have is not read


# ---- what is read


class CountingFile:
    """A safetensors file that counts the elements it is asked for."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.elements = tensor, 0

    def get_tensor(self, name: str) -> torch.Tensor:
        self.elements += self.tensor.numel()
        return self.tensor

    def get_slice(self, name: str) -> "CountingFile":
        return self

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def __getitem__(self, rows: slice) -> torch.Tensor:
        self.elements += self.tensor[rows].numel()
        return self.tensor[rows]


@pytest.mark.parametrize("shape", [(), (1,), (11,), (7, 3), (1, 20), (4, 3, 5)])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_all_ranks_together_read_a_tensor_once(shape: tuple[int, ...], world_size: int) -> None:
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape)
    size = -(-tensor.numel() // world_size)
    row = torch.Size(shape[1:]).numel()
    parts = []
    for rank in range(world_size):
        file = CountingFile(tensor)
        parts.append(elements(file, "weight", rank * size, min((rank + 1) * size, tensor.numel())))
        assert file.elements <= len(parts[-1]) + 2 * (row - 1)  # whole rows, the first and the last only in part needed
    assert torch.equal(torch.cat(parts), tensor.flatten())


def test_a_rank_that_cannot_read_tells_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_rank()
    folder, told = save(tmp_path / "llama"), []

    def broken(file: Any, name: str, begin: int, end: int) -> torch.Tensor:
        raise OSError("stale file handle")

    def raise_together(error: Exception | None) -> None:
        told.append(str(error))
        raise RuntimeError("rank 2 failed: OSError: no space") if error is None else error

    monkeypatch.setattr(slices, "raise_together", raise_together)
    with pytest.raises(ModelError, match="llama cannot be loaded: rank 2 failed: OSError: no space"):
        load_partitioned(folder)
    monkeypatch.setattr(slices, "elements", broken)
    with pytest.raises(ModelError, match="llama cannot be loaded: stale file handle"):
        load_partitioned(folder)
    assert told == ["None", "stale file handle"]


def load_partitioned(folder: Path) -> None:
    config = load_config(folder, trust_remote_code=False)
    stage3 = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}
    load_model(folder, config, register("sdpa"), torch.float32, stage3, False, trust_remote_code=False)
