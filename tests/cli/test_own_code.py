"""A model whose code comes with it: refused with the option that allows it, and whole where it is allowed."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from dpo_dist.adapters.export import _merge
from dpo_dist.cli import app
from dpo_dist.errors import ModelError
from tests.launching import REPOSITORY

TINY = REPOSITORY / "tests" / "golden" / "tiny_policy"
CODE = {
    "configuration_mine.py": "from transformers import LlamaConfig\n"
    "class MyConfig(LlamaConfig):\n    model_type = 'mine'\n",
    "modeling_mine.py": "from transformers import LlamaForCausalLM\nfrom .configuration_mine import MyConfig\n"
    "class MyModel(LlamaForCausalLM):\n    config_class = MyConfig\n",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of such a model, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DPO_DIST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    # What other tests of this process have loaded from elsewhere would be found first.
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not Path(path, "transformers_modules").is_dir()])
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)
    model = tmp_path / "mine"
    shutil.copytree(TINY, model)
    values = json.loads((TINY / "config.json").read_text())
    auto_map = {"AutoConfig": "configuration_mine.MyConfig", "AutoModelForCausalLM": "modeling_mine.MyModel"}
    (model / "config.json").write_text(
        json.dumps({**values, "model_type": "mine", "architectures": ["MyModel"], "auto_map": auto_map})
    )
    for name, text in CODE.items():
        (model / name).write_text(text)
    row = {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9, 2], "rejected_ids": [10, 2]}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    config = {
        "model": {"model_name_or_path": str(model), "dtype": "float32"},
        "data": {"train": [{"path": "pairs.jsonl"}]},
        "train": {"output_dir": "out", "examples_per_step": 1, "max_steps": 1, "learning_rate": 1e-3},
        "parallel": {"deepspeed": "zero0_cpu"},
        "log": {"report_to": []},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def refused(result: Result) -> str:
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize("command", ["check", "train"])
def test_it_is_not_run_unasked(folder: Path, command: str) -> None:
    line = refused(run(command, "run.yaml"))
    assert f"model.model_name_or_path={folder / 'mine'} needs code of its own, which is not run unasked" in line
    assert "model.trust_remote_code=true" in line
    model = f"model.model_name_or_path={TINY}"
    line = refused(run(command, "run.yaml", model, f"model.reference_name_or_path={folder / 'mine'}"))
    assert f"model.reference_name_or_path={folder / 'mine'} needs code of its own" in line


def test_it_goes_with_the_model(folder: Path) -> None:
    result = run("train", "run.yaml", "model.trust_remote_code=true")
    assert result.exit_code == 0, (result.output, result.exception)
    checkpoint = "out/checkpoints/step-000001"
    for place in ("out/model", f"{checkpoint}/model_assets"):
        assert {name: (folder / place / name).read_text() for name in CODE} == CODE
    line = refused(run("export", checkpoint, "exported"))
    assert f"CHECKPOINT={checkpoint} needs code of its own" in line and "--trust-remote-code" in line
    result = run("export", checkpoint, "exported", "--trust-remote-code")
    assert result.exit_code == 0, result.output
    assert {name: (folder / "exported" / name).read_text() for name in CODE} == CODE


def test_a_base_model_with_such_code_is_not_merged_into_unasked(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"mine needs code of its own.*--trust-remote-code"):
        _merge(folder / "mine", folder, trust_remote_code=False)
