"""`keep_end_of_prompt`: the end of a prompt is what the completions answer."""

import json
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.config import DataConfig, DataSource
from dpo_dist.errors import DataError
from dpo_dist.tokenization import TokenizedDataset, load_tokenizer, prepare_dataset
from tests.byte_tokenizer import BOS, EOS, save_tokenizer


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [user("one"), says("first"), user("two"), says("second"), user("three")]
ANSWERS = {"chosen": [says("third")], "rejected": [says("thirty")]}


@pytest.fixture
def run(tmp_path: Path) -> Any:
    def tokenized(rows: list[Any], max_length: int, bos: bool = True, **settings: Any) -> TokenizedDataset:
        spec = save_tokenizer(tmp_path / "tokenizer", bos=bos)
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        settings = {"max_length": max_length, "truncation_mode": "keep_end_of_prompt", **settings}
        data = DataConfig(train=[DataSource(path=str(path))], **settings)
        found = prepare_dataset(data.train, data, spec, tmp_path / "cache")
        tokenized.tokenizer = load_tokenizer(spec)  # pyright: ignore[reportFunctionMemberAccess]
        return found

    return tokenized


def length_of(run: Any, row: dict[str, Any]) -> int:
    example = run([row], 10_000)[0]
    return len(example.prompt_ids) + max(map(len, example.completion_ids))


@pytest.mark.parametrize("system", [[], [SYSTEM]])
def test_a_conversation_loses_its_oldest_turns_and_nothing_else(run: Any, system: list[Any]) -> None:
    whole = {"prompt": [*system, *TURNS], **ANSWERS}
    for kept in range(3):  # how many of the older questions
        shorter = {"prompt": [*system, *TURNS[4 - 2 * kept :]], **ANSWERS}
        fits = length_of(run, shorter)
        longest = length_of(run, {"prompt": [*system, *TURNS[max(0, 2 - 2 * kept) :]], **ANSWERS})
        for limit in {fits, longest - 1 if kept < 2 else longest}:
            dataset = run([whole], limit)
            assert dataset[0] == run([shorter], 10_000)[0]  # header and all
            assert dataset.notes == ({"prompt_shortened": 1} if kept < 2 else {})


def test_what_cannot_be_shortened_is_left_out_and_counted(run: Any) -> None:
    last = length_of(run, {"prompt": [SYSTEM, TURNS[-1]], **ANSWERS})
    dataset = run([{"prompt": [SYSTEM, *TURNS], **ANSWERS}, {"prompt": "a", "chosen": "b", "rejected": "c"}], last - 1)
    assert (len(dataset), dataset.bad_rows, dataset.notes) == (1, {"over_long": 1}, {})
    long_answer = {"prompt": "a", "chosen": "b" * 30, "rejected": "c"}
    with pytest.raises(DataError, match=r"none of the 1 rows .* can be used \(over_long: 1\)"):
        run([long_answer], 31)  # it needs 33: BOS, the prompt's last token, the answer, EOS
    (bos, last_id) = run([{**long_answer, "prompt": "xyz"}], 33)[0].prompt_ids
    assert (bos, run.tokenizer.decode([last_id])) == (BOS, "z")


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("limit", range(8, 20))
def test_a_string_loses_its_first_tokens_but_not_bos(run: Any, limit: int, bos: bool) -> None:
    row = {"prompt": "0123456789", "chosen": "abc", "rejected": "defgh"}
    prompt = run([row], limit, bos)[0].prompt_ids
    text = run.tokenizer.decode([token for token in prompt if token != BOS])
    room = min(10, limit - 6 - bos)  # the longer completion and its EOS
    assert (prompt[0] == BOS) is bos
    assert text == "0123456789"[10 - room :]
    completions = run([row], limit, bos)[0].completion_ids
    assert [len(ids) for ids in completions] == [4, 6] and all(ids[-1] == EOS for ids in completions)


def test_token_ids_lose_their_first(run: Any) -> None:
    row = {"prompt_ids": [*range(10, 20)], "chosen_ids": [1, 2], "rejected_ids": [3]}
    assert run([row], 6)[0].prompt_ids == (16, 17, 18, 19)
    with pytest.raises(DataError, match="over_long: 1"):
        run([row], 2)


def test_notes_of_attempts_do_not_count(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A newline at the border merges with the answer's, in every rendering of the row: it is told of once."""
    row = {"prompt": [*TURNS], "chosen": [says("\nthird")], "rejected": [says("\nthirty")]}
    merged = {"boundary_merged": 1}
    assert run([row], 10_000).notes == merged
    last = length_of(run, {**row, "prompt": TURNS[-1:]})
    assert run([row], last).notes == {**merged, "prompt_shortened": 1}


def test_messages_of_the_user_that_follow_one_another_stay_together(run: Any) -> None:
    question = [user("Here is the document: a b c"), user("Summarise it.")]
    row = {"prompt": [user("one"), says("first"), *question], **ANSWERS}
    fits = length_of(run, {"prompt": question, **ANSWERS})
    assert run([row], fits)[0] == run([{"prompt": question, **ANSWERS}], 10_000)[0]
    with pytest.raises(DataError, match="over_long: 1"):
        run([row], fits - 1)


def test_a_very_long_conversation(run: Any) -> None:
    """Found without trying every number of turns, each of which renders what is left."""
    turns = [turn for k in range(400) for turn in (user(f"q{k}"), says(f"a{k}"))]
    whole = {"prompt": [SYSTEM, *turns, user("last")], **ANSWERS}
    expected = {"prompt": [SYSTEM, *turns[-6:], user("last")], **ANSWERS}
    assert run([whole], length_of(run, expected))[0] == run([expected], 10_000)[0]
