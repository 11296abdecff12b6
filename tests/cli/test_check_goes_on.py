"""What `check` remarks on and goes on, where `train` refuses."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from dpo_dist.cli import app
from tests.cli.test_mistakes import config, refuse, snapshot

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
