"""What rewards of rated completions are held against: which completions follow which prompts, and a running mean."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.baseline import Strangers
from dpo_dist.config import DataConfig, DataSource
from dpo_dist.metrics import RewardMean
from dpo_dist.packing import sizes_of
from dpo_dist.tokenization import TokenizedDataset, prepare_dataset
from tests.byte_tokenizer import save_tokenizer


@pytest.fixture
def dataset(tmp_path: Path) -> TokenizedDataset:
    """Three rated completions, a pair that is taken apart, and a long prompt."""
    rows: list[dict[str, Any]] = [
        {"prompt_ids": [10, 11], "completion_ids": [20, 21, 22], "label": True},
        {"prompt_ids": [12], "completion_ids": [23], "label": False},
        {"prompt_ids": [13], "chosen_ids": [24, 25], "rejected_ids": [26, 27, 28, 29]},
        {"prompt_ids": [14] * 6, "completion_ids": [30], "label": True},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(train=[DataSource(path=str(path))])
    return prepare_dataset(data.train, data, save_tokenizer(tmp_path / "t"), tmp_path / "cache", rated="all")


def test_every_prompt_takes_a_completion_of_the_one_before_in_the_step(dataset: TokenizedDataset) -> None:
    strangers = Strangers(dataset, (3, 0, 2, 1), max_tokens=100)
    found = [(strangers[row].prompt_ids, strangers[row].completion_ids) for row in strangers.rows]
    assert found == [
        ((14,) * 6, ((23,),)),  # the first takes the last one's
        ((10, 11), ((30,),)),
        ((13,), ((20, 21, 22),)),
        ((12,), ((26, 27, 28, 29),)),  # fourth place: the second of two
    ]
    assert strangers.rows == [3, 0, 2, 1]
    sizes = [(size.prompt, size.completions) for size in strangers.sizes]
    assert sizes == [(6, (1,)), (2, (1,)), (1, (3,)), (1, (4,))]
    assert len(strangers) == len(dataset)


def test_what_would_be_too_long_is_cut(dataset: TokenizedDataset) -> None:
    strangers = Strangers(dataset, (2, 3, 0), max_tokens=7)
    assert [strangers[row].completion_ids for row in strangers.rows] == [((20, 21, 22),), ((26,),), ((30,),)]
    assert [size.completions for size in strangers.sizes] == [(3,), (1,), (1,)]


def test_in_a_step_of_one_there_is_no_stranger(dataset: TokenizedDataset) -> None:
    assert Strangers(dataset, (1,), max_tokens=100).rows == []


def test_completions_after_the_same_prompt_are_no_strangers(tmp_path: Path) -> None:
    prompts = (1, 1, 2, 2, 1)
    rows = [{"prompt_ids": [p], "completion_ids": [20 + k], "label": k % 2 == 0} for k, p in enumerate(prompts)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(train=[DataSource(path=str(path))])
    dataset = prepare_dataset(data.train, data, save_tokenizer(tmp_path / "t"), tmp_path / "cache", rated="all")
    strangers = Strangers(dataset, (0, 1, 2, 3, 4), max_tokens=100)
    assert [strangers[row].completion_ids[0][0] for row in strangers.rows] == [23, 23, 21, 21, 23]
    assert [strangers[row].prompt_ids for row in strangers.rows] == [(p,) for p in prompts]
    assert Strangers(dataset, (4, 0, 1), max_tokens=100).rows == []


def test_denominators(dataset: TokenizedDataset) -> None:
    sizes = sizes_of(dataset, range(4))
    assert [size.rated_weight for size in sizes] == [1.0, 1.0, 2.0, 1.0]
    assert [size.demonstrated_tokens for size in sizes] == [3, 0, 2, 1]  # of good ones alone


def test_a_running_mean_survives_a_checkpoint() -> None:
    rewards = RewardMean()
    assert rewards.value == 0.0
    rewards.total, rewards.count = 0.1 + 0.2, 3.0
    assert RewardMean.from_json(json.loads(json.dumps(rewards.to_json()))) == rewards
    assert math.isclose(rewards.value, 0.1)
    assert RewardMean.from_json({}) == RewardMean()
    for broken in ({"total": 1.0}, {"total": 1.0, "count": "3"}, {"total": 1.0, "count": 3.0, "more": 0.0}):
        with pytest.raises(ValueError, match="a mean of rewards has total and count"):
            RewardMean.from_json(broken)
