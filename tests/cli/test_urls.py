"""Commands whose data are on another machine: a web server of this process."""

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dpo_dist.cli import app
from dpo_dist.data import remote
from tests.cli.test_mistakes import config, refuse
from tests.launching import launch
from tests.web_server import WebServer, serving

__all__ = ["config"]

SECRET = "c2VjcmV0LXNpZ25hdHVyZQ"


@pytest.fixture
def web(config: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WebServer]:
    """Serves the data of `config`, which are no longer where they were."""
    monkeypatch.setattr(remote, "_PAUSES_S", (0.0, 0.0, 0.0))
    (config / "cache" / "served").mkdir(parents=True)
    (config / "pairs.jsonl").rename(config / "cache" / "served" / "pairs.jsonl")
    with serving(config / "cache" / "served") as server:
        yield server


def address(web: WebServer, name: str = "pairs.jsonl") -> str:
    return f"{web.url}/{name}?code={SECRET}"


@pytest.mark.parametrize("command", ["check", "inspect", "precompute"])
def test_commands_read_a_url(config: Path, web: WebServer, command: str) -> None:
    result = CliRunner().invoke(app, [command, "run.yaml", f"data.train.0.path={address(web)}"])
    assert result.exit_code == 0, result.output
    assert SECRET not in result.output


def test_ranks_train_on_one_copy(config: Path, web: WebServer) -> None:
    """And a secret in the address is written into the file alone that reproduces the run."""
    overrides = [f"data.{kind}.0.path={address(web)}" for kind in ("train", "evaluation")]
    done = launch(2, "dpo_dist", "train", "run.yaml", *overrides, "evaluation.eval_on_start=true", cwd=config)
    assert done.returncode == 0, done.stderr
    assert SECRET not in done.stdout + done.stderr
    # Whichever rank made it: one that is not the first says nothing of it.
    assert len(list((config / "cache" / "data" / "copies").rglob("*.jsonl"))) == 1
    lines = [json.loads(line) for line in (config / "out" / "metrics.jsonl").read_text().splitlines()]
    assert {line["dataset"] for line in lines if "dataset" in line} == {"pairs"}
    holding = [path for path in (config / "out").rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert {path.name for path in holding} <= {"config.yaml", "state.json", "trainer_state.json"}


@pytest.mark.parametrize("command", ["train", "check"])
@pytest.mark.parametrize(
    ("status", "error"),
    [(404, "is not there"), (403, "may not be read"), (500, "cannot be read")],
)
def test_a_copy_that_fails(config: Path, web: WebServer, command: str, status: int, error: str) -> None:
    web.answers = [status] * 9
    said = refuse(config, f"data.train.0.path={address(web)}", command=command)
    assert f"data.train.0.path={web.url}/pairs.jsonl?*** {error}" in said
    assert SECRET not in said


@pytest.mark.parametrize("override", ["data.train.path=", "data.train.0.pth=", "loss.beta="])
def test_a_mistake_beside_it(config: Path, web: WebServer, override: str) -> None:
    assert SECRET not in refuse(config, f"{override}{address(web)}")


def test_a_bad_row_is_named_by_the_address(config: Path, web: WebServer) -> None:
    web.put("pairs.jsonl", b'{"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [4, 3]}\n{\n')
    assert f"{web.url}/pairs.jsonl?***:2: broken JSON" in refuse(config, f"data.train.0.path={address(web)}")


@pytest.mark.skipif(find_spec("s3fs") is not None, reason="it is installed")
def test_a_missing_package(config: Path) -> None:
    said = refuse(config, "data.train.0.path=s3://bucket/pairs.jsonl")
    assert "s3:// needs the package s3fs; run `pip install s3fs" in said
