"""Of a completion of several turns the assistant's are learned; what others say in it is read, and not scored."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_dist.batch import build_micro_batch
from dpo_dist.cli.data_quality import describe_quality
from dpo_dist.config import DataConfig, DataSource
from dpo_dist.errors import DataError
from dpo_dist.inspection.columns import PairColumns
from dpo_dist.inspection.lengths import rules
from dpo_dist.packing import sizes_of
from dpo_dist.selfcheck.comparison import alone
from dpo_dist.tokenization import TokenizedDataset, load_tokenizer, prepare_dataset
from dpo_dist.tokenization.turns import given, is_learned, number_learned, plain
from tests import chat_templates
from tests.byte_tokenizer import CHATML, save_tokenizer


def say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


PROMPT = [say("user", "One?")]
LONG = [say("assistant", "Yes."), say("user", "Sure? Wirklich, ö?"), say("assistant", "Very.")]
ROW = {"prompt": PROMPT, "chosen": LONG, "rejected": [say("assistant", "No.")]}


class Data:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def of(self, row: dict[str, Any], template: str = CHATML, trims: bool = False, **settings: Any) -> TokenizedDataset:
        path = self.folder / "rows.jsonl"
        path.write_text(json.dumps(row) + "\n")
        self.spec = save_tokenizer(self.folder / "tokenizer", template)
        if trims:
            file = self.folder / "tokenizer" / "tokenizer.json"
            trimming = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
            file.write_text(json.dumps({**json.loads(file.read_text()), "post_processor": trimming}))
        data = DataConfig(train=[DataSource(path=str(path))], **settings)
        return prepare_dataset(data.train, data, self.spec, self.folder / "cache")

    def learned(self, dataset: TokenizedDataset, number: int = 0) -> list[str]:
        """The runs of learned tokens of a completion, as text."""
        tokenizer, runs = load_tokenizer(self.spec), [[]]
        for token in dataset[0].completion_ids[number]:
            if is_learned(token):
                runs[-1].append(token)
            elif runs[-1]:
                runs.append([])
        return [str(tokenizer.decode(run)) for run in runs if run]


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return Data(tmp_path)


def test_what_is_learned(data: Data) -> None:
    dataset = data.of(ROW)
    assert data.learned(dataset) == ["Yes.<|im_end|>\n", "Very.<|im_end|>\n"]
    assert data.learned(dataset, 1) == ["No.<|im_end|>\n"]
    text = "Yes.<|im_end|>\n<|im_start|>user\nSure? Wirklich, ö?<|im_end|>\n<|im_start|>assistant\nVery.<|im_end|>\n"
    assert dataset.sample(0, load_tokenizer(data.spec)).completions[0] == text  # all of it is read


def test_every_token_where_it_is_asked_for(data: Data) -> None:
    dataset, every = data.of(ROW), data.of(ROW, assistant_only_loss=False)
    assert every[0].completion_ids[0] == plain(dataset[0].completion_ids[0])
    assert every.preferences.num_given_tokens == 0 < dataset.preferences.num_given_tokens
    assert every.fingerprint != dataset.fingerprint
    assert every.max_token_id == dataset.max_token_id


@pytest.mark.parametrize("name", chat_templates.ALL)
def test_by_every_template(data: Data, name: str) -> None:
    """What is learned of several turns is what is learned of each answer on its own, in its place."""
    template = chat_templates.ALL[name]
    dataset = data.of(ROW, template)
    first = data.of({**ROW, "chosen": LONG[:1]}, template)
    last = data.of(
        {"prompt": [*PROMPT, *LONG[:2]], "chosen": LONG[2:], "rejected": [say("assistant", "No.")]}, template
    )
    apart = [data.learned(one) for one in (first, last)]
    found = data.learned(dataset)
    assert len(found) == 2
    assert "Yes." in found[0] and "Very." in found[1] and "Sure" not in "".join(found)
    assert found[1:] == apart[1]
    # A template may end a conversation otherwise than a turn.
    assert apart[0][0].startswith(found[0]) or found[0].startswith(apart[0][0])


def test_what_a_tool_answers_is_given(data: Data) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}
    answers = [call, say("tool", "12 degrees"), say("assistant", "Cold.")]
    dataset = data.of({"prompt": PROMPT, "chosen": answers, "rejected": LONG}, chat_templates.ALL["Qwen 3"])
    found = data.learned(dataset)
    assert len(found) == 2 and '"name": "f"' in found[0] and found[1].startswith("Cold.")
    assert [len(data.learned(dataset, number)) for number in (0, 1)] == [2, 2]


def test_where_the_template_renders_a_turn_in_two_ways(data: Data) -> None:
    """The last answer alone is marked: the first is another one while it is the last."""
    template = (
        "{% for m in messages %}[{{ m['role'] }}]{% if m['role'] == 'assistant' and loop.last %}*{% endif %}"
        "{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    match = r"jsonl:1: .* renders the turns before them otherwise .*only_loss=false.*turns_moved"
    with pytest.raises(DataError, match=match):
        data.of(ROW, template)


def test_a_cut_before_the_second_answer(data: Data) -> None:
    whole = data.of(ROW)
    first = data.learned(whole)[0]
    room = len(whole[0].prompt_ids) + len(first) + 4
    cut = data.of(ROW, max_length=room, truncation_mode="keep_start")
    assert data.learned(cut)[0] == first[: len(data.learned(cut)[0])]
    assert number_learned(cut[0].completion_ids[0]) < number_learned(whole[0].completion_ids[0])


def test_a_micro_batch_reads_all_and_scores_what_is_learned(data: Data) -> None:
    dataset = data.of(ROW)
    example = dataset[0]
    batch = build_micro_batch([example], [0], share_prompts=True)
    every = build_micro_batch([replace(example, completion_ids=tuple(map(plain, example.completion_ids)))], [0], True)
    assert torch.equal(batch.input_ids_T, every.input_ids_T) and torch.equal(batch.position_ids_T, every.position_ids_T)
    kept = [is_learned(token) for ids in example.completion_ids for token in ids]
    assert batch.target_ids_M.tolist() == every.target_ids_M[torch.tensor(kept)].tolist()
    assert batch.score_index_M.tolist() == every.score_index_M[torch.tensor(kept)].tolist()
    lengths = [number_learned(ids) for ids in example.completion_ids]
    assert tuple(batch.completion_length_C.tolist()) == tuple(lengths) == dataset.learned_lengths[0]
    assert torch.bincount(batch.completion_of_M).tolist() == lengths
    for k in (0, 1):
        one = alone(example, k, k)
        assert one.target_ids_M.tolist() == batch.target_ids_M[batch.completion_of_M == k].tolist()
        assert len(one.input_ids_T) == len(example.prompt_ids) + len(example.completion_ids[k]) - 1
        assert one.input_ids_T[one.score_index_M[:-1] + 1].tolist() == one.target_ids_M[:-1].tolist()


def test_lengths_that_losses_divide_by(data: Data) -> None:
    (size,) = sizes_of(data.of(ROW), [0])
    learned = number_learned(data.of(ROW)[0].completion_ids[0])
    assert size.demonstrated_tokens == learned < size.completions[0]
    weighted = build_micro_batch([data.of(ROW)[0]], [0], share_prompts=True, ld_alpha=0.5)
    assert weighted.token_weight_M is not None
    assert len(weighted.token_weight_M) == len(weighted.target_ids_M)


def test_a_given_token_is_no_token_id() -> None:
    assert [given(0), given(5)] == [-1, -6]
    assert plain([given(0), 3, given(5)]) == (0, 3, 5)
    assert [is_learned(token) for token in (given(0), 0, 3)] == [False, True, True]


def test_a_tokenizer_that_leaves_spaces_out_of_places(data: Data) -> None:
    """Llama 3's does (`trim_offsets`): a token of spaces has no width, and stands where the next turn begins."""
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}[U]{{ m['content'] }}[A]{% else %}{{ m['content'] }}"
        "{% endif %}{% endfor %}"
    )
    row = {**ROW, "chosen": [say("assistant", "Yes.  "), say("user", "  Sure?  "), say("assistant", "  Very.")]}
    for trims in (False, True):
        dataset = data.of(row, template, trims=trims)
        assert data.learned(dataset) == ["Yes.  ", "  Very."]


def test_the_longer_completion_is_the_one_with_more_that_is_learned(data: Data) -> None:
    short = say("assistant", "Yes.")
    many_given = [short, say("user", "And is that so, even on a day like this?"), short]
    dataset = data.of({"prompt": PROMPT, "chosen": many_given, "rejected": [say("assistant", "No." * 12)]})
    assert "chosen is the longer one in 0%" in describe_quality(dataset)[0]
    assert rules(PairColumns(dataset))[0].right == 0.0
