"""All of transformers' causal architectures: each is right, or refused by `check` in one line; the page says so."""

import logging
import re
from collections.abc import Iterator

import pytest
from transformers import T5Config, ViTConfig

from dpo_dist.errors import ModelError
from dpo_dist.model import try_architecture
from dpo_dist.pretrained import SHARES_PROMPTS, decide_sharing
from tests.parity import sweep


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """Classes say a lot while they are built."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def verdicts() -> dict[str, sweep.Verdict]:
    return {name: sweep.judge(name) for name in sweep.TYPES}


pytestmark = pytest.mark.filterwarnings("ignore")  # theirs


@pytest.mark.thorough  # half a minute for all of them
def test_nothing_is_wrong_untried_or_a_traceback(verdicts: dict[str, sweep.Verdict]) -> None:
    faulty = {name: one for name, one in verdicts.items() if one.kind not in ("shared", "right", "refused")}
    assert not faulty


@pytest.mark.thorough
def test_no_feature_changes_a_verdict(verdicts: dict[str, sweep.Verdict]) -> None:
    """Scales, softcaps and windows that are neutral by default."""
    featured = {name: sweep.judge(name, featured=True).kind for name in sweep.TYPES}
    changed = {name: kind for name, kind in featured.items() if kind != verdicts[name].kind}
    assert changed == {"phimoe": "refused"}, "its window is in the mask alone"


@pytest.mark.thorough  # half a minute for all of them
def test_the_checked_ones_share_their_prompts(verdicts: dict[str, sweep.Verdict]) -> None:
    shared = {sweep.config_of(name).model_type for name, one in verdicts.items() if one.kind == "shared"}
    assert shared == SHARES_PROMPTS


@pytest.mark.thorough  # half a minute for all of them
def test_a_refusal_is_one_line_with_the_architecture_and_a_reason(verdicts: dict[str, sweep.Verdict]) -> None:
    for name, one in verdicts.items():
        if one.kind == "refused":
            pattern = (
                rf"model\.model_name_or_path: architecture {re.escape(name)} cannot be (packed|trained here): .{{20,}}"
            )
            assert re.fullmatch(pattern, one.reason), one.reason


@pytest.mark.parametrize("name", ["roberta", "bert", "gptj", "gpt_neo", "falcon", "bart", "bloom", "mamba", "gemma3"])
def test_what_was_once_wrong_or_a_traceback_is_refused(name: str) -> None:
    assert sweep.judge(name).kind == "refused"


@pytest.mark.parametrize("name", ["hyperclovax", "afmoe", "jetmoe"])
def test_what_was_once_wrong_or_a_traceback_is_right(name: str) -> None:
    assert sweep.judge(name).kind == "right"


@pytest.mark.thorough  # half a minute for all of them
def test_the_page_is_what_the_command_prints(verdicts: dict[str, sweep.Verdict]) -> None:
    assert sweep.PAGE.read_text() == sweep.page(verdicts), "run `python -m tests.parity.sweep`"


@pytest.mark.parametrize("config", [T5Config(), ViTConfig()], ids=["t5", "vit"])
def test_what_is_no_causal_model_is_refused(config) -> None:
    with pytest.raises(ModelError, match=f"architecture {config.model_type} cannot be"):
        shared, _ = decide_sharing(config, "auto")
        try_architecture(config, sweep.KEY, shared)


def test_a_configuration_that_cannot_be_made_small_is_left_to_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(config: object) -> None:
        raise ValueError("sizes do not fit")

    monkeypatch.setattr("dpo_dist.model.probe.shrunk", fails)
    assert try_architecture(sweep.config_of("llama"), sweep.KEY, True).untried == "ValueError: sizes do not fit"


@pytest.mark.parametrize(
    ("name", "table"), [("llama", False), ("gpt2", True), ("opt", True), ("gpt_neox", False), ("gpt_bigcode", True)]
)
def test_tables_of_positions_are_found(name: str, table: bool) -> None:
    config = sweep.config_of(name)
    assert try_architecture(config, sweep.KEY, decide_sharing(config, "auto")[0]).has_position_table is table
