"""What is remarked on: a folder in use by `check` alone, and keys without effect, once, by `check` and by `train`."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dpo_dist.cli import app
from tests.cli.test_mistakes import config, refuse, snapshot
from tests.launching import launch, succeeded

__all__ = ["config"]

NOT_EMPTY = "train.output_dir=out is not empty"


def check(*overrides: str) -> str:
    result = CliRunner().invoke(app, ["check", "run.yaml", *overrides])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize(
    ("overrides", "note"),
    [
        ([], f"note: {NOT_EMPTY}; choose another folder, or continue the run in it with checkpoint.resume=auto\n"),
        (["checkpoint.resume=auto"], f"note: {NOT_EMPTY} and holds no run (no config.yaml); checkpoint.resume=auto"),
    ],
)
def test_output_folder_in_use(config: Path, overrides: list[str], note: str) -> None:
    (config / "out").mkdir()
    (config / "out" / "thesis.tex").write_text("years of work")
    before = snapshot(config)
    output = check(*overrides)
    assert output.count(note) == 1
    assert output.rstrip().endswith("the configuration can be trained, in another folder")
    assert snapshot(config) == before
    assert NOT_EMPTY in refuse(config, *overrides)


def test_a_new_output_folder(config: Path) -> None:
    (config / "out").mkdir()
    output = check()
    assert NOT_EMPTY not in output
    assert output.rstrip().endswith("the configuration can be trained")


@pytest.mark.parametrize(
    ("overrides", "remark"),
    [
        (["train.seed=7", "train.shuffle=false"], "train.seed=7 has no effect with train.shuffle=false: nothing else"),
        (["data.pairing=adjacent"], "data.pairing=adjacent has no effect: no row has a list of completions; leave"),
        (["loss.loss_weights=[1]"], "loss.loss_weights=[1.0] has no effect with one loss; leave this out"),
        (
            ["reference.zero_hpz_partition_size=2"],
            "reference.zero_hpz_partition_size=2 has no effect below ZeRO stage 3, where every process holds the whole",
        ),
        (["health.max_accuracy_gap=0.5"], "health.max_accuracy_gap=0.5 has no effect without held-out pairs"),
    ],
)
def test_keys_without_effect_on_the_result(config: Path, overrides: list[str], remark: str) -> None:
    assert check(*overrides).count(f"note: {remark}") == 1
    result = CliRunner().invoke(app, ["train", "run.yaml", *overrides])
    assert result.exit_code == 0, result.output
    assert result.output.count(remark) == 1


@pytest.mark.parametrize("adapter", [[], ["adapter.peft_type=lora"]])
def test_leaf_modules_of_an_own_file_are_left_out_with_adapters(config: Path, adapter: list[str]) -> None:
    zero = {"stage": 3, "leaf_module": {"classes": ["LlamaDecoderLayer"]}}
    (config / "own.json").write_text(json.dumps({"zero_optimization": zero}))
    told = f"note: parallel.deepspeed={config / 'own.json'}: zero_optimization.leaf_module has no effect with adapters"
    assert check("parallel.deepspeed=own.json", *adapter).count(told) == len(adapter)
    assert "zero_optimization.leaf_module" not in check("parallel.deepspeed=zero3_cpu", *adapter)  # nobody asked for it


def test_a_run_goes_on_with_another_seed_that_nothing_reads(config: Path) -> None:
    """The resolved configuration has no such key, and continues the run that was started with it."""
    arguments = ["train", "run.yaml", "train.shuffle=false", "checkpoint.resume=auto"]
    assert CliRunner().invoke(app, [*arguments, "train.seed=7"]).exit_code == 0
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "nothing is left to do" in result.output


def test_two_ranks_say_it_once(config: Path) -> None:
    done = launch(2, "dpo_dist", "train", "run.yaml", "train.shuffle=false", "train.seed=7", cwd=config, timeout=240)
    succeeded(done)
    assert done.stderr.count("train.seed=7 has no effect with train.shuffle=false") == 1
    assert "seed" not in (config / "out" / "config.yaml").read_text()
