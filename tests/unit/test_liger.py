"""When Liger's kernels are refused, and what is left of them in the process. Its kernels: tests/gpu_contract."""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig, PreTrainedModel
from transformers.integrations import liger as integration
from transformers.models.llama import modeling_llama

from dpo_dist.errors import ConfigError
from dpo_dist.model.liger import LIGER_CHECKED, require_liger, use_liger, without_liger
from dpo_dist.model.probe import try_architecture
from dpo_dist.pretrained import SHARES_PROMPTS
from dpo_dist.reference import numerics_of
from tests.liger_package import KNOWN, hide_liger, install_liger
from tests.parity.oracle import llama_config
from tests.parity.test_architectures import build

CUDA = torch.device("cuda", 0)


def _refusal(*configs: PretrainedConfig, device: torch.device = CUDA) -> str:
    with pytest.raises(ConfigError, match=r"^model\.use_liger_kernel=true.* leave it out: the result is") as one:
        require_liger(device, *configs)
    return str(one.value)


def test_needs_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_liger(tmp_path, monkeypatch)
    assert "needs a GPU with Triton, and this run is on cpu" in _refusal(llama_config(), device=torch.device("cpu"))


def test_needs_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    hide_liger(monkeypatch)
    assert "needs the package liger-kernel; install it by pip install 'dpo-dist[liger]'" in _refusal(llama_config())


def test_a_package_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_liger(tmp_path, monkeypatch, "import triton_of_another_day")
    message = _refusal(llama_config())
    assert "cannot be imported (ModuleNotFoundError: No module named 'triton_of_another_day')" in message


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (GPT2Config(), "liger-kernel has no kernels for architecture gpt2"),
        (build("mixtral"), "were never compared with the own forward of architecture mixtral"),
        (LlamaConfig(auto_map={"AutoModel": "mine.Model"}), "does not know the code that comes with this model"),
        (LlamaConfig(hidden_act="gelu"), "computes silu or swish in architecture llama, and this model has gelu"),
        (
            build("gemma2", hidden_activation="gelu"),
            "computes gelu_pytorch_tanh in architecture gemma2, and this model has gelu",
        ),
    ],
)
def test_a_model_that_it_does_not_compute(
    config: PretrainedConfig, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_liger(tmp_path, monkeypatch)
    assert reason in _refusal(config)
    assert reason in _refusal(llama_config(), config), "the reference counts as well"


def test_models_that_it_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_liger(tmp_path, monkeypatch)
    require_liger(CUDA, llama_config(), build("gemma2"), build("qwen2"))


def test_every_architecture_on_the_list_is_trained_with_shared_prompts() -> None:
    assert LIGER_CHECKED <= SHARES_PROMPTS  # whose cases tests/gpu_contract/test_liger.py takes


# ---- what is replaced


class LigersNorm(torch.nn.Module):
    """What Liger puts in the place of a class."""


def _ligers_rotation(query: Any, key: Any, *rest: Any) -> Any:
    raise RuntimeError("Pointer argument cannot be accessed from Triton (cpu tensor?)")


@pytest.fixture
def handed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """What Liger is told, by a Liger that replaces what the real one does."""
    told: list[dict[str, Any]] = []

    def apply(model: PreTrainedModel, settings: dict[str, Any]) -> None:
        told.append(settings)
        modeling_llama.LlamaRMSNorm = LigersNorm  # type: ignore[misc, assignment]
        modeling_llama.apply_rotary_pos_emb = _ligers_rotation

    install_liger(tmp_path, monkeypatch, KNOWN)
    for name in ("LlamaRMSNorm", "apply_rotary_pos_emb"):
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    monkeypatch.setattr(integration, "apply_liger_kernel", apply)
    yield told
    without_liger()


def _model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(llama_config())


def test_the_head_stays_ours_and_the_compared_rotation_is_taken(handed_over: list[dict[str, Any]]) -> None:
    use_liger(_model())
    assert handed_over == [{"cross_entropy": False, "fused_linear_cross_entropy": False}]
    assert sys.modules["liger_kernel.backends"].chosen == ["nvidia-triton"]
    assert not logging.getLogger("liger_kernel.backends.registry").isEnabledFor(logging.WARNING)


def test_classes_are_put_back_at_once_and_functions_when_liger_is_given_up(handed_over: list[dict[str, Any]]) -> None:
    norm, rotation = modeling_llama.LlamaRMSNorm, modeling_llama.apply_rotary_pos_emb
    for _ in range(2):  # the policy, and the reference
        use_liger(_model())
        assert modeling_llama.LlamaRMSNorm is norm
        assert modeling_llama.apply_rotary_pos_emb is _ligers_rotation
    without_liger()
    assert modeling_llama.apply_rotary_pos_emb is rotation


def test_an_architecture_is_tried_after_a_run_with_liger(handed_over: list[dict[str, Any]]) -> None:
    use_liger(_model())
    assert try_architecture(llama_config(), "model.model_name_or_path", share_prompts=True).untried == ""


def test_stored_values_are_of_the_kernels_that_computed_them() -> None:
    assert numerics_of("sdpa") == "1-sdpa"
    assert numerics_of("sdpa", uses_liger=True) == "1-sdpa-liger"
