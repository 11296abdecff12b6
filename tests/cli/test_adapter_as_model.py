"""An adapter's folder where a model is asked for: refused with the key that it belongs under."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dpo_dist.cli import app
from tests.cli.test_mistakes import GOLDEN, config, refuse

__all__ = ["config"]

MODEL, REFERENCE = "model.model_name_or_path", "model.reference_name_or_path"


@pytest.fixture
def adapter(config: Path) -> Path:
    """An adapter as it is exported: its settings and weights, a tokenizer, and no model."""
    folder = config / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base", "r": 4}))
    shutil.copy(GOLDEN / "tiny_policy" / "model.safetensors", folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("command", ["check", "train"])
@pytest.mark.parametrize("with_config", [False, True])
def test_as_the_policy(config: Path, adapter: Path, command: str, with_config: bool) -> None:
    if with_config:
        shutil.copy(GOLDEN / "tiny_policy" / "config.json", adapter)
    message = refuse(config, f"{MODEL}=adapter", command=command)
    assert f"{MODEL}={adapter} is an adapter, not a model (it has adapter_config.json, and no model's we" in message
    assert f"to go on training it, set adapter.adapter_name_or_path={adapter} and {MODEL}=org/base" in message
    assert f"run `dpo-dist export {adapter} NEW_FOLDER --merged`" in message


@pytest.mark.parametrize("settings", ["{", "[]", "{}", '{"base_model_name_or_path": null}'])
def test_an_adapter_that_names_no_model(config: Path, adapter: Path, settings: str) -> None:
    (adapter / "adapter_config.json").write_text(settings)
    assert f"and {MODEL}=the model that it belongs to; to make" in refuse(config, f"{MODEL}=adapter")


@pytest.mark.parametrize("command", ["check", "train"])
def test_as_the_reference(config: Path, adapter: Path, command: str) -> None:
    message = refuse(config, f"{REFERENCE}=adapter", command=command)
    assert f"{REFERENCE}={adapter} is an adapter, not a model" in message
    assert f"run `dpo-dist export {adapter} NEW_FOLDER --merged`" in message
    assert f"a run with adapter.adapter_name_or_path={adapter} has it as its reference" in message


def test_as_the_base_of_another(config: Path, adapter: Path) -> None:
    result = CliRunner().invoke(app, ["export", "adapter", "out", "--merged", "--base", "adapter"])
    assert result.exit_code == 2
    assert "--base=adapter is an adapter, not a model" in result.output
    assert "give the model that it belongs to" in result.output


def test_a_model_beside_an_adapter_is_a_model(config: Path, adapter: Path) -> None:
    shutil.copytree(GOLDEN / "tiny_policy", adapter, dirs_exist_ok=True)
    result = CliRunner().invoke(app, ["check", "run.yaml", f"{MODEL}=adapter"])
    assert "is an adapter, not a model" not in result.output
