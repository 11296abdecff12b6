"""What has got its name is on the device, and the name too: a power cut right after leaves all of it or none.

A kill cannot show it, since the system keeps what a dead process has written. So it is followed which files are synced,
and how long they are then.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from dpo_dist.checkpoint import CheckpointStore, export_model
from dpo_dist.config import DataConfig, DataSource
from dpo_dist.distributed import Ranks
from dpo_dist.tokenization import TokenizerSpec, prepare_dataset
from tests.run_states import run_state
from tests.tiny_engine import tiny_config

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


class Followed:
    """What was synced, what got its name before it was, and which folders' new names are not on the device yet."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.synced: dict[Path, object] = {}
        self.too_early: list[Path] = []
        self.open_names: set[Path] = set()
        self.published: list[str] = []
        for name in ("rename", "replace"):
            monkeypatch.setattr(os, name, self._noting(getattr(os, name), is_replace=name == "replace"))
        monkeypatch.setattr(os, "fsync", self._sync)

    def _sync(self, descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        self.synced[path] = _look_of(path)
        self.open_names.discard(path)

    def _noting(self, real: Any, is_replace: bool) -> Any:
        def rename(source: Path | str, target: Path | str) -> None:
            if is_replace or Path(source).is_dir():
                parts = [Path(source), *Path(source).rglob("*")]
                self.too_early += [part for part in parts if self.synced.get(part) != _look_of(part)]
                self.open_names.add(Path(target).parent)
                self.published.append(Path(target).name)
            real(source, target)

        return rename


def _look_of(path: Path) -> object:
    return sorted(os.listdir(path)) if path.is_dir() else path.stat().st_size


@pytest.fixture
def followed(monkeypatch: pytest.MonkeyPatch) -> Followed:
    return Followed(monkeypatch)


def test_a_checkpoint(tmp_path: Path, followed: Followed) -> None:
    def write(folder: Path) -> None:
        (folder / "shards").mkdir()
        torch.save({"step": 3}, folder / "shards/optim_states.pt")

    CheckpointStore(tmp_path, ALONE).save(run_state(3), write, lambda folder: (folder / "extra.txt").write_text("x"))
    assert followed.published == ["step-000003", "latest"]
    assert (followed.too_early, followed.open_names) == ([], set())


def test_a_model(tmp_path: Path, followed: Followed) -> None:
    model = LlamaForCausalLM(tiny_config())
    export_model(tmp_path / "model", model.named_parameters(), ALONE, model.config)
    assert followed.published == ["model"]
    assert (followed.too_early, followed.open_names) == ([], set())


def test_tokenised_data(tmp_path: Path, followed: Followed) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}\n')
    sources = [DataSource(path=str(tmp_path / "rows.jsonl"))]
    data = DataConfig(train=sources)
    found = prepare_dataset(sources, data, TokenizerSpec("unused"), tmp_path / "cache")
    assert len(found) == 1 and len(followed.published) == 1
    assert (followed.too_early, followed.open_names) == ([], set())
