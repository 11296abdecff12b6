"""Whether a folder's files fit its configuration, before anything is loaded."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from dpo_dist.errors import ModelError
from dpo_dist.model import Fit, find_fit
from dpo_dist.pretrained import load_config
from dpo_dist.selfcheck.blame import blame_weights
from tests.parity.oracle import llama_config

KEY = "model.model_name_or_path"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Llama as save_pretrained writes it."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(llama_config()).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def fit_of(folder: Path, **changes: object) -> Fit:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return find_fit(folder, load_config(folder, trust_remote_code=False), trust_remote_code=False)


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor for name, tensor in (load_file(path) | changes).items() if tensor is not None}
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_model_fits_itself(folder: Path) -> None:
    fit = fit_of(folder)
    fit.require(KEY, folder)
    assert fit.is_exact
    assert fit.remark(KEY, folder) is None


@pytest.mark.parametrize("changes", [{"hidden_size": 64}, {"vocab_size": 68}, {"num_key_value_heads": 4}])
def test_other_sizes_are_refused_with_a_tensor_and_both_shapes(folder: Path, changes: dict[str, int]) -> None:
    message = rf"{KEY}=.*tiny: \d+ weights have other shapes .* such as [\w.]+: \(.*\), expected \(.*\); weights and"
    with pytest.raises(ModelError, match=message):
        fit_of(folder, **changes).require(KEY, folder)


def test_more_layers_than_the_files_hold_are_refused(folder: Path) -> None:
    with pytest.raises(
        ModelError, match=rf"{KEY}=.*tiny lacks 9 weights of its architecture, such as model\.layers\.2\."
    ):
        fit_of(folder, num_hidden_layers=3).require(KEY, folder)


def test_fewer_layers_than_the_files_hold_are_remarked_on(folder: Path) -> None:
    fit = fit_of(folder, num_hidden_layers=1)
    fit.require(KEY, folder)
    remark = fit.remark(KEY, folder)
    assert remark is not None
    assert "tiny: 9 tensors of its files are in no part of the model" in remark
    assert "model.layers.1." in remark


def test_what_every_model_leaves_out_is_not_worth_a_remark(folder: Path) -> None:
    rewrite(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    assert fit_of(folder).remark(KEY, folder) is None


def test_former_names_are_left_to_transformers(folder: Path) -> None:
    norm = load_file(folder / "model.safetensors")["model.norm.weight"]
    rewrite(folder, **{"model.norm.weight": None, "norm.weight": norm})
    fit = fit_of(folder)
    fit.require(KEY, folder)
    assert not fit.is_exact
    assert fit.remark(KEY, folder) is None


def test_experts_that_are_kept_apart_are_left_to_transformers(tmp_path: Path) -> None:
    sizes = {"vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    AutoModelForCausalLM.from_config(CONFIG_MAPPING["mixtral"](**sizes, **heads)).save_pretrained(tmp_path)
    fit = fit_of(tmp_path)
    fit.require(KEY, tmp_path)
    assert fit.is_converted
    assert not fit.is_exact


def test_a_cut_file_is_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged or no safetensors file \(.*\); copy it again"):
        fit_of(folder)


def test_weights_that_are_no_numbers_are_told_from_dropout() -> None:
    finite, broken = torch.zeros(2), torch.tensor([0.0, float("nan")])
    assert blame_weights({"policy": finite, "reference": finite}) == []
    (fault,) = blame_weights({"policy": finite, "reference": broken})
    assert fault.startswith("weights: log-probabilities of the reference are not finite")
