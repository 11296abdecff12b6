"""Token ids of conversations equal TRL's where TRL is right; where it is not, the row is refused or said to differ."""

import json
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.config import DataConfig
from dpo_dist.data import PreferenceExample, RowFault
from dpo_dist.data.rows import parse_row
from dpo_dist.tokenization import TokenizedExample, load_tokenizer
from dpo_dist.tokenization.encode import Encoder
from tests.byte_tokenizer import save_tokenizer
from tests.chat_templates import ALL
from tests.golden.conversations import ROWS
from tests.golden.ratings import RECORDED_TOKENS, rated_conversations

RECORDED = json.loads(Path(__file__).with_name("trl_tokens.json").read_text())
RECORDED_RATED = json.loads(RECORDED_TOKENS.read_text())

# What TRL trains on without a word, and why the row is refused here; of all other rows the ids are equal.
REFUSED = {
    "ends with the user": ("no_answer", list(ALL)),  # the user's words become the answer's
    "thinking": ("not_rendered", [name for name in ALL if name != "Qwen 3"]),  # the thought is left out
    "earlier thinking": ("not_rendered", [name for name in ALL if name != "Qwen 3"]),
    "tools": ("not_rendered", [name for name in ALL if not name.startswith("Qwen")]),  # the model never hears of them
    "call": ("not_rendered", [name for name in ALL if not name.startswith("Qwen")]),  # the answer is empty
    "call as text": ("not_rendered", [name for name in ALL if not name.startswith("Qwen")]),
    "call and answer": ("not_rendered", [name for name in ALL if not name.startswith("Qwen")]),
    "system": ("prompt_moved", ["Mistral"]),  # the question becomes part of the answer
}
# Both train, on other ids.
DIFFERENT = {("Qwen 2.5", "call as text"): "TRL's arguments are encoded twice"}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Encoder]:
    folder = tmp_path_factory.mktemp("tokenizers")
    config = DataConfig(train=[{"path": "none"}])  # type: ignore[list-item]
    return {
        name: Encoder(config, load_tokenizer(save_tokenizer(folder / name, template)), name)
        for name, template in ALL.items()
    }


def encoded(encoder: Encoder, row: dict[str, Any]) -> TokenizedExample | RowFault:
    example = parse_row(row, "pairs.jsonl:1")
    if not isinstance(example, PreferenceExample):
        return example
    (result,) = encoder.encode([example])
    return result


@pytest.mark.parametrize("case", ROWS)
@pytest.mark.parametrize("template", ALL)
def test_ids_are_trls_or_refused(encoders: dict[str, Encoder], template: str, case: str) -> None:
    ours, theirs = encoded(encoders[template], ROWS[case]), RECORDED[template][case]
    reason, templates = REFUSED.get(case, ("", []))
    if template in templates:
        assert isinstance(ours, RowFault) and ours.reason == reason
        return
    assert isinstance(ours, TokenizedExample), ours
    ids = {"prompt_ids": list(ours.prompt_ids)}
    ids |= {f"{name}_ids": list(one) for name, one in zip(("chosen", "rejected"), ours.completion_ids, strict=True)}
    if (template, case) in DIFFERENT:
        assert ids != theirs
    else:
        assert ids == theirs


@pytest.mark.parametrize("case", rated_conversations())
@pytest.mark.parametrize("template", ALL)
def test_ids_of_rated_rows_are_those_of_its_kto_trainer(encoders: dict[str, Encoder], template: str, case: str) -> None:
    ours, theirs = encoded(encoders[template], rated_conversations()[case]), RECORDED_RATED[template][case]
    reason, templates = REFUSED.get(case, ("", []))
    if template in templates:
        assert isinstance(ours, RowFault) and ours.reason == reason
        return
    assert isinstance(ours, TokenizedExample) and ours.ratings == (True,)
    ids = {"prompt_ids": list(ours.prompt_ids), "completion_ids": list(ours.completion_ids[0])}
    assert (ids == theirs) == ((template, case) not in DIFFERENT)


def test_what_is_refused_lost_something_in_trl() -> None:
    """TRL's ids are those of the row without the part."""
    for case in ("thinking", "tools"):
        for template in REFUSED[case][1]:
            assert RECORDED[template][case] == RECORDED[template]["one turn"], (template, case)
    for template in REFUSED["call"][1]:
        called = RECORDED[template]["call as text"]
        bare = RECORDED[template]["one turn"]
        if template != "DeepSeek":  # which has calls, and no tools
            assert len(called["chosen_ids"]) == len(bare["chosen_ids"]) - len("Noon.")
    assert RECORDED["Mistral"]["system"]["prompt_ids"] != RECORDED["Mistral"]["one turn"]["prompt_ids"]
    assert len(RECORDED["Mistral"]["system"]["chosen_ids"]) > len(RECORDED["Mistral"]["one turn"]["chosen_ids"])


def test_arguments_as_text_are_those_of_an_object(encoders: dict[str, Encoder]) -> None:
    for template in ("Qwen 2.5", "Qwen 3"):
        one, other = (encoded(encoders[template], ROWS[case]) for case in ("call", "call as text"))
        assert isinstance(one, TokenizedExample) and isinstance(other, TokenizedExample)
        assert one.completion_ids == other.completion_ids
