"""A real model on real pairs: packed forwards with shared prompts give the log-probabilities of plain transformers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_dist.attention.interface import register
from dpo_dist.batch import RankWork
from dpo_dist.cli import cache_dir
from dpo_dist.config import DataConfig, DataSource
from dpo_dist.demo import demo_model_folder
from dpo_dist.model import ScoringModel, load_model
from dpo_dist.packing import Packer, sizes_of
from dpo_dist.pretrained import load_config
from dpo_dist.tokenization import TokenizedDataset, TokenizerSpec, prepare_dataset
from tests.golden.record_demo_logps import PAIRS, RECORDED, digest_of, first_pairs
from tests.launching import REPOSITORY

SHARED_DATA = REPOSITORY.parent / "shared" / "data"
FILES = {"hh_rlhf_harmless": "hh_rlhf_harmless.jsonl.gz", "dpo_en_demo": "dpo_en_demo.json.gz"}
NUM_PAIRS = {"hh_rlhf_harmless": 24, "dpo_en_demo": 16}
TOLERANCE = 2e-3  # nats, of sums over up to 1000 tokens in float32
MAX_TOKENS = 2048


@pytest.fixture(scope="module")
def folder() -> Path:
    return demo_model_folder(cache_dir())


@pytest.fixture(scope="module")
def model(folder: Path) -> ScoringModel:
    """The demo model as a run loads it: float32, in this process alone."""
    name = register("sdpa")
    return load_model(folder, load_config(folder, False), name, torch.float32, {}, False, False).eval()


def _tokenized(path: Path, folder: Path, cache: Path) -> TokenizedDataset:
    source = DataSource(path=str(path))
    return prepare_dataset(
        [source], DataConfig(train=[source], on_bad_row="skip"), TokenizerSpec(str(folder)), cache / "data"
    )


@torch.no_grad()
def _logps(model: ScoringModel, dataset: TokenizedDataset, rows: Sequence[int]) -> list[tuple[float, ...]]:
    """log pi of both completions of some rows, nats, through the packed path of a step."""
    plan = Packer(1, MAX_TOKENS, MAX_TOKENS, share_prompts=True).plan(0, rows, sizes_of(dataset, rows))
    batches = RankWork(plan, 0, dataset, share_prompts=True).micro_batches()
    assert 1 < len(batches) < len(rows)  # several examples lie side by side
    logps = torch.zeros(2 * len(rows))
    for batch in batches:
        logps[batch.completion_index_C] = batch.completion_sums(model(batch))
    return [(chosen, rejected) for chosen, rejected in logps.view(-1, 2).tolist()]


def _assert_equal_to_recorded(
    model: ScoringModel, dataset: TokenizedDataset, rows: Sequence[int], recorded: list[dict[str, Any]]
) -> None:
    counts = [(int(dataset.prompt_lengths[row]), *dataset.completion_lengths[row]) for row in rows]
    assert counts == [tuple(one[f"{part}_tokens"] for part in ("prompt", "chosen", "rejected")) for one in recorded]
    for logps, one in zip(_logps(model, dataset, rows), recorded, strict=True):
        assert logps == pytest.approx((one["chosen_logp"], one["rejected_logp"]), abs=TOLERANCE, rel=0), one


@pytest.mark.thorough
@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="needs ../shared/data")
@pytest.mark.parametrize("name", FILES)
def test_public_pairs(name: str, model: ScoringModel, folder: Path, tmp_path: Path) -> None:
    recorded = json.loads((REPOSITORY / "tests" / "golden" / "smollm2_logps.json").read_text())[name]
    dataset = _tokenized(SHARED_DATA / FILES[name], folder, tmp_path)
    by_line = {dataset.source_of(row).rsplit(":", 1)[1]: row for row in range(len(dataset))}
    # HH-RLHF was recorded by line; the other file is one JSON array, recorded by index.
    rows = [by_line[str(one["line"])] if "line" in one else one["index"] for one in recorded]
    assert len(rows) == NUM_PAIRS[name]
    _assert_equal_to_recorded(model, dataset, rows, recorded)


def test_the_projects_own_pairs(model: ScoringModel, folder: Path, tmp_path: Path) -> None:
    recorded = json.loads(RECORDED.read_text())
    again = "configs/demo/train.jsonl has changed: run `python -m tests.golden.record_demo_logps`"
    assert recorded["pairs_sha256"] == digest_of(first_pairs()), again
    dataset = _tokenized(PAIRS, folder, tmp_path)
    assert len(recorded["pairs"]) == 20
    _assert_equal_to_recorded(model, dataset, range(20), recorded["pairs"])


def test_the_recorded_completions_can_be_told_apart() -> None:
    """Numbers this far apart do not agree by accident."""
    for one in json.loads(RECORDED.read_text())["pairs"]:
        assert abs(one["chosen_logp"] - one["rejected_logp"]) > 10 * TOLERANCE
