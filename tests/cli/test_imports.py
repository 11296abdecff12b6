"""A run imports what it uses: real processes, whose `sys.modules` is looked through when they end."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.golden.trajectories import base_config
from tests.launching import launch

# By what a run has to ask for before it is imported. Two more are no packages: a compiler's front end, which
# transformers' model classes bring along (`torch._inductor` holds operators for tests), and its back end.
ADAPTER = {"peft", "bitsandbytes", "dpo_dist.adapters"}
HUB = {"datasets", "pandas"}
TRACKERS = {"tensorboard", "wandb", "mlflow"}
COMPILER = {"torch._inductor.compile_fx", "torch._inductor.codegen", "triton"}
MODEL_CLASS = {"transformers.modeling_utils", "deepspeed", "dpo_dist.model", "dpo_dist.engine"}


def imported(tmp_path: Path, command: str, exit_code: int = 0, **sections: dict[str, Any]) -> set[str]:
    """Modules of one process that was asked to do something with the tiny model."""
    config = base_config(tmp_path / "out")
    config["train"] |= {"max_steps": 1}
    config["log"] = {"report_to": []}
    for section, values in sections.items():
        config[section] = {**config.get(section, {}), **values}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    # A cache of its own: what another test has tokenised would not be tokenised here.
    env = {"DPO_DIST_CACHE": str(tmp_path / "cache")}
    done = launch(1, "tests.imports_worker", str(tmp_path / "modules.json"), command, "run.yaml", cwd=tmp_path, env=env)
    assert done.returncode == exit_code, done.stderr
    return set(json.loads((tmp_path / "modules.json").read_text()))


def test_a_run_of_all_weights(tmp_path: Path) -> None:
    modules = imported(tmp_path, "train")
    assert modules & (ADAPTER | HUB | TRACKERS | COMPILER) == set()
    assert modules >= MODEL_CLASS
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()


def test_a_run_with_a_cached_reference(tmp_path: Path) -> None:
    """When the cache is written, and when it is read."""
    for output in ("out", "again"):
        train = {"output_dir": str(tmp_path / output)}
        modules = imported(tmp_path, "train", reference={"source": "cache"}, train=train)
        assert modules & (ADAPTER | HUB | TRACKERS | COMPILER) == set()


def test_a_run_with_an_adapter_and_a_tracker(tmp_path: Path) -> None:
    modules = imported(tmp_path, "train", adapter={"peft_type": "lora"}, log={"report_to": ["tensorboard"]})
    # PEFT imports bitsandbytes where it is installed.
    assert modules >= MODEL_CLASS | {"peft", "dpo_dist.adapters", "tensorboard"}
    assert not modules & (HUB | TRACKERS - {"tensorboard"})


@pytest.mark.parametrize("command", ["check", "train"])
def test_a_mistake_in_the_data_is_found_without_a_model_class(tmp_path: Path, command: str) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 4"}\n')
    modules = imported(tmp_path, command, 2, data={"train": [{"path": str(tmp_path / "bad.jsonl")}]})
    assert not modules & (MODEL_CLASS | ADAPTER | HUB | TRACKERS | COMPILER)
    assert "dpo_dist.tokenization" in modules
