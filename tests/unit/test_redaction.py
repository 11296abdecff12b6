"""What looks like a secret is written nowhere."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import typer

from dpo_dist import cli
from dpo_dist.cli import run_folder
from dpo_dist.cli.logs import set_up_logging
from dpo_dist.cli.redaction import redact_tracebacks, redacted, redacted_values
from dpo_dist.config import load_config
from dpo_dist.errors import ConfigError, ModelError
from dpo_dist.metrics import MetricsFile

HUB = "hf_" + "aBcDeFgHiJkLmNoPqRsTuVwXyZ0123456789"
ENVIRONMENT = "0123456789abcdef" * 2  # as a key of Weights & Biases


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("model=https://me:secret@host/a", "model=https://***@host/a"),
        ("https://me:se@cret@host/a", "https://***@host/a"),
        ("https://ghp@host/a@b", "https://***@host/a@b"),
        ("(https://host/a?token=abc&b=1) failed", "(https://host/a?token=***&b=1) failed"),
        ("https://host/a?b=1&X-Amz-Signature=abc", "https://host/a?b=1&X-Amz-Signature=***"),
        ("x=https://host/a.jsonl.gz?code=abc&b=1 and more", "x=https://host/a.jsonl.gz?*** and more"),
        ("https://host/a.jsonl?***:3: broken", "https://host/a.jsonl?***:3: broken"),
        (f"runs/{HUB}/x", "runs/hf_***/x"),
        ("Authorization: Bearer abcdefgh.ijk", "Authorization: Bearer ***"),
        (f"key {ENVIRONMENT} refused", "key *** refused"),
    ],
)
def test_it_is_hidden(text: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", ENVIRONMENT)
    assert redacted(text) == shown
    assert redacted(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "model.model_name_or_path=hf_small_model is neither a folder here nor a model",
        "https://github.com/owner/name/issues/1 and me@host.org",
        f"model.revision={'a1' * 20}",
        "data.train.0.path=/home/me/pairs?key.jsonl:3: tokens=12",
        "a basic rule: true",
    ],
)
def test_other_text_stays(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "true")
    assert redacted(text) == text


def test_values_keep_their_shape() -> None:
    values = {"a": [{"b": f"x {HUB}"}, 1, None], "c": True}
    assert redacted_values(values) == {"a": [{"b": "x hf_***"}, 1, None], "c": True}


def test_in_an_error_and_in_what_torchrun_repeats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(report))
    with pytest.raises(typer.Exit), cli.user_errors():
        raise ModelError(f"model.model_name_or_path={HUB} does not exist")
    assert capsys.readouterr().err == "error: model.model_name_or_path=hf_*** does not exist\n"
    assert HUB not in report.read_text() and "hf_***" in json.loads(report.read_text())["message"]


def test_in_the_log_and_in_tracebacks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    monkeypatch.setattr("sys.excepthook", None)
    set_up_logging()
    error = ValueError(f"token {HUB}")
    logging.getLogger("another.package").warning("refused: %s", HUB, exc_info=error)
    redact_tracebacks()
    import sys

    sys.excepthook(ValueError, error, None)
    written = capsys.readouterr().err
    assert HUB not in written and written.count("hf_***") == 3


def test_in_what_trackers_get(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run.yaml").write_text("data: {train: [{path: a.jsonl}]}\nmodel: {model_name_or_path: a}\n")
    out = tmp_path / HUB
    out.mkdir(parents=True)
    config = load_config(str(tmp_path / "run.yaml"), [f"train.output_dir={out}", "log.report_to=[tensorboard]"])
    given: list[Any] = []

    def fails(folder: Path, values: dict[str, Any], first_step: int) -> None:
        given.append(values)
        raise RuntimeError("enough is seen")

    monkeypatch.setitem(run_folder.TRACKERS, "tensorboard", fails)
    with pytest.raises(ConfigError):
        run_folder.start_trackers(config, MetricsFile(out / "metrics.jsonl"), 1)
    assert given and HUB not in json.dumps(given)
