"""Whatever a user wrote reaches the tokens, by any chat template, or the row is refused with a way out."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from dpo_dist.config import DataConfig, DataSource
from dpo_dist.errors import DataError, ModelError
from dpo_dist.tokenization import TokenizedDataset, TokenizerSpec, load_tokenizer, prepare_dataset
from dpo_dist.tokenization.conversation import Renderer
from tests import chat_templates as templates
from tests.byte_tokenizer import save_tokenizer
from tests.golden.conversations import TOOL, USER, calls, row, says

SYSTEM = {"role": "system", "content": "Be brief."}


class Reader:
    """Rows by a template, as text again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def data(self, template: str, rows: list[dict[str, Any]] | Path, **settings: Any) -> TokenizedDataset:
        path = rows
        if not isinstance(rows, Path):
            path = self.folder / "pairs.jsonl"
            path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
        self.spec = save_tokenizer(self.folder / "tokenizer", template)
        source = DataSource(path=str(path))
        config = DataConfig(train=[source], **settings)
        return prepare_dataset([source], config, self.spec, self.folder / "cache")

    def texts(self, template: str, rows: list[dict[str, Any]] | Path) -> tuple[str, ...]:
        sample = self.data(template, rows).sample(0, load_tokenizer(self.spec))
        return (sample.prompt, *sample.completions)


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    return Reader(tmp_path)


# ---- tools and tool calls


def test_a_template_that_ignores_tool_calls(reader: Reader) -> None:
    """The chosen completion would be an empty turn, and the model would learn to say nothing."""
    with pytest.raises(DataError, match=r"pairs\.jsonl:1: .* does not show a tool call of message 2 .*not_rendered"):
        reader.data(templates.SMOLLM2, [row(chosen=[calls({"zone": "UTC"})])])


def test_a_template_that_ignores_tools(reader: Reader) -> None:
    with pytest.raises(
        DataError, match=r"pairs\.jsonl:1: the chat template does not show tools to the model; name the"
    ):
        reader.data(templates.SMOLLM2, [row(tools=[TOOL])])


def test_a_template_that_ignores_reasoning(reader: Reader) -> None:
    thoughtful = says("Noon.", reasoning_content="The sun is high.")
    with pytest.raises(DataError, match="does not show reasoning_content of message 2 to the model; write it into the"):
        reader.data(templates.SMOLLM2, [row(chosen=[thoughtful])])


def test_a_template_that_ignores_the_system_message(reader: Reader) -> None:
    with pytest.raises(DataError, match=r"leaves out message 1 \(role system\): 'Be brief\.'"):
        reader.data(templates.FORGETFUL, [row(prompt=[SYSTEM, USER])])


def test_all_rows_that_lose_something_are_counted_or_skipped(reader: Reader) -> None:
    rows = [row(), row(tools=[TOOL]), row(chosen=[calls({})])]
    with pytest.raises(DataError, match=r"2 of 3 rows cannot be used.*\n  2 x not_rendered"):
        reader.data(templates.SMOLLM2, rows)
    assert reader.data(templates.SMOLLM2, rows, on_bad_row="skip").bad_rows == {"not_rendered": 2}


@pytest.mark.parametrize("template", [templates.QWEN_2_5, templates.QWEN_3])
@pytest.mark.parametrize("form", [dict, json.dumps], ids=["object", "text"])
def test_arguments_are_encoded_once(reader: Reader, template: str, form: Any) -> None:
    _, chosen, _ = reader.texts(template, [row(chosen=[calls(form({"zone": "UTC"}))])])
    assert chosen == '<tool_call>\n{"name": "clock", "arguments": {"zone": "UTC"}}\n</tool_call><|im_end|>\n'


@pytest.mark.parametrize("form", [dict, json.dumps], ids=["object", "text"])
def test_a_template_that_wants_text_gets_text(reader: Reader, form: Any) -> None:
    _, chosen, _ = reader.texts(templates.DEEPSEEK, [row(chosen=[calls(form({"zone": "UTC"}))])])
    assert chosen == '<call>clock\n{"zone": "UTC"}</call><|end|>'


def test_text_stays_as_it_was_written_where_the_template_takes_text(reader: Reader) -> None:
    _, chosen, _ = reader.texts(templates.QWEN_3, [row(chosen=[calls('{"zone":"UTC"}')])])
    assert '"arguments": {"zone":"UTC"}' in chosen


def test_reasoning_of_earlier_turns_is_the_templates_to_drop(reader: Reader) -> None:
    earlier = [USER, says("Noon.", reasoning_content="High sun."), {"role": "user", "content": "Sure?"}]
    learned = says("Yes.", reasoning_content="I looked.")
    prompt, chosen, _ = reader.texts(templates.QWEN_3, [row(prompt=earlier, chosen=[learned])])
    assert "High sun." not in prompt and "<think>\nI looked.\n</think>\n\nYes." in chosen


# ---- the border


def test_words_of_the_prompt_in_the_completion(reader: Reader) -> None:
    with pytest.raises(
        DataError, match=r"pairs\.jsonl:1: .*words of the prompt become part of the completion: '.*time is"
    ):
        reader.data(templates.MISTRAL, [row(prompt=[SYSTEM, USER])])
    prompt, chosen, _ = reader.texts(templates.MISTRAL, [row()])
    assert (prompt, chosen) == ("<s>[INST] What time is it?[/INST]", " Noon.</s>")


def test_an_answer_that_repeats_the_question_is_no_moved_prompt(reader: Reader) -> None:
    """The template adds a header to the last turn only: the border moves, the words do not."""
    template = templates.LLAMA_3.replace("\n\n{% endif %}", "\n\n<think>{% endif %}")
    data = reader.data(template, [row(chosen=[says("What time is it?")])])
    assert data.notes == {"prompt_not_a_prefix": 1}


# ---- roles


@pytest.mark.parametrize("role", ["human", "user"])
def test_names_of_speakers_are_roles(reader: Reader, role: str) -> None:
    prompt, *_ = reader.texts(templates.LLAMA_3, [row(prompt=[{**USER, "role": role}])])
    assert "<|start_header_id|>user<|end_header_id|>\n\nWhat" in prompt


def test_a_role_that_the_template_has_never_heard_of(reader: Reader) -> None:
    critic = {"role": "critic", "content": "Hm."}
    with pytest.raises(DataError, match=r"the chat template knows no role 'critic'; rename it to user, assistant"):
        reader.data(templates.LLAMA_3, [row(prompt=[USER, critic])])
    named = templates.LLAMA_3.replace("{% for m in messages %}", "{# 'critic' #}{% for m in messages %}")
    assert len(reader.data(named, [row(prompt=[USER, critic])])) == 1


def test_a_conversation_that_ends_with_the_user_has_no_answer(reader: Reader) -> None:
    with pytest.raises(
        DataError, match=r"the chosen completion ends with a message of role 'user': there is no answer"
    ):
        reader.data(templates.LLAMA_3, [row(chosen=[says("Noon."), USER])])


# ---- the same rows in any file


NULLED = [
    row(tools=[TOOL], chosen=[calls({"zone": "UTC"})]),
    row(tools=[TOOL], chosen=[calls({"city": "Rome", "zone": None})]),
]


@pytest.mark.parametrize("form", ["parquet", "arrow", "json type", "json type in arrow"])
def test_tool_calls_are_the_same_tokens_in_any_file(reader: Reader, form: str, tmp_path: Path) -> None:
    expected = reader.data(templates.QWEN_2_5, NULLED)
    path = tmp_path / ("pairs.arrow" if "arrow" in form else "pairs.parquet")
    if form.startswith("json"):
        dataset = Dataset.from_list(NULLED, on_mixed_types="use_json")
        assert "Json" in str(dataset.features)
        if "arrow" in form:
            dataset.save_to_disk(tmp_path / "saved")
            path = tmp_path / "saved"
        else:
            dataset.to_parquet(path)
    elif form == "arrow":
        table = pa.Table.from_pylist(NULLED)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    else:
        pq.write_table(pa.Table.from_pylist(NULLED), path)
    assert reader.data(templates.QWEN_2_5, path).fingerprint == expected.fingerprint


def test_arguments_reach_the_model_as_objects_from_json_columns(reader: Reader, tmp_path: Path) -> None:
    path = tmp_path / "pairs.parquet"
    Dataset.from_list(NULLED, on_mixed_types="use_json").to_parquet(path)
    prompt, chosen, _ = reader.texts(templates.QWEN_2_5, path)
    assert '{"zone": "UTC"}' in chosen and '"name": "clock"' in prompt


# ---- found by attacking it


def test_a_dropped_message_whose_words_stand_elsewhere(reader: Reader) -> None:
    template = templates.LLAMA_3.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'tool' %}")
    prompt = [{"role": "user", "content": "Is it 18 degrees?"}, says("I look."), {"role": "tool", "content": "18"}]
    with pytest.raises(DataError, match=r"leaves out message 3 \(role tool\): '18'"):
        reader.data(template, [row(prompt=prompt)])


def test_the_second_of_two_calls(reader: Reader) -> None:
    template = templates.QWEN_3.replace(
        "{% for c in m['tool_calls'] or [] %}", "{% for c in (m['tool_calls'] or [])[:1] %}"
    )
    both = says("", tool_calls=[*calls({"zone": "UTC"})["tool_calls"], *calls({})["tool_calls"]])
    with pytest.raises(DataError, match="does not show tool call 2 of message 2"):
        reader.data(template, [row(chosen=[both])])
    assert reader.data(templates.QWEN_3, [row(chosen=[both])])


def test_arguments_that_are_not_shown(reader: Reader) -> None:
    template = templates.QWEN_3.replace("{{ f['arguments'] | tojson }}", "{}")
    with pytest.raises(DataError, match="does not show a tool call of message 2"):
        reader.data(template, [row(chosen=[calls({"zone": "UTC"})])])


def test_a_call_in_the_old_form(reader: Reader) -> None:
    with pytest.raises(DataError, match=r"does not show function_call of message 2 .*; write it as tool_calls"):
        reader.data(templates.QWEN_3, [row(chosen=[says("I look.", function_call={"name": "clock"})])])


# Cuts what an answer thought out of its content, wherever it stands. As DeepSeek R1's.
R1 = templates.LLAMA_3.replace("m['content'] | trim", "m['content'].split('</think>')[-1] | trim").replace(
    "<|end_header_id|>\n\n{% endif %}", "<|end_header_id|>\n\n<think>\n{% endif %}"
)


def test_a_thought_inside_of_the_answer(reader: Reader) -> None:
    thoughtful = says("<think>\nHigh sun.\n</think>\n\nNoon.")
    with pytest.raises(DataError, match=r"leaves out the beginning of message 2: '<think>"):
        reader.data(R1, [row(chosen=[thoughtful])])
    earlier = [USER, thoughtful, {"role": "user", "content": "Sure?"}]
    assert reader.data(R1, [row(prompt=earlier)]).notes == {"prompt_not_a_prefix": 1}
    assert reader.data(templates.LLAMA_3, [row(chosen=[thoughtful])]).notes == {}


def test_a_short_question_whose_words_stand_in_the_answer(reader: Reader) -> None:
    """Only the header of the answer differs: no word of the prompt moves."""
    short = [{"role": "user", "content": "a"}]
    data = reader.data(R1, [row(prompt=short, chosen=[says("four a day")], rejected=[says("a")])])
    assert data.notes == {"prompt_not_a_prefix": 1}


def test_a_history_that_is_rendered_again(reader: Reader) -> None:
    """Once an answer follows, the call before the tool's answer is written in another way, and all behind it moves."""
    again = "{% if not loop.last and messages[-1]['role'] == 'assistant' %} to{% endif %}"
    template = templates.QWEN_3.replace("{{ m['content'] }}{% for c", again + "{{ m['content'] }}{% for c")
    prompt = [USER, calls({"zone": "UTC"}), {"role": "tool", "content": '{"t": 18}'}]
    with pytest.raises(DataError, match="words of the prompt become part of the completion"):
        reader.data(template, [row(prompt=prompt)])


@pytest.mark.parametrize("form", [dict, json.dumps], ids=["object", "text"])
@pytest.mark.parametrize(
    "written",
    [
        "{% for k, v in f['arguments'].items() %}<{{ k }}>{{ v }}</{{ k }}>{% endfor %}",  # text has no items
        "{% if f['arguments'] is mapping %}{% for k, v in f['arguments'].items() %}<{{ k }}>{{ v }}</{{ k }}>"
        "{% endfor %}{% else %}{{ f['arguments'] }}{% endif %}",
    ],
    ids=["only objects", "a form of its own"],
)
def test_templates_that_write_arguments_in_their_own_form(reader: Reader, form: Any, written: str) -> None:
    template = templates.QWEN_2_5.replace("{{ f['arguments'] | tojson }}", written)
    _, chosen, _ = reader.texts(template, [row(chosen=[calls(form({"zone": "UTC"}))])])
    assert "<zone>UTC</zone>" in chosen and "{" not in chosen.split('"arguments": ')[1].replace("}\n", "")


def test_a_turn_that_may_not_end_a_conversation(reader: Reader) -> None:
    """What a template refuses with and without the thought says nothing about the thought."""
    rule = "{% if messages[-1]['tool_calls'] %}{{ raise_exception('an answer must follow') }}{% endif %}"
    call = {**calls({"zone": "UTC"}), "reasoning_content": "I ask."}
    prompt = [USER, call, {"role": "tool", "content": "12:00"}]
    assert len(reader.data(rule + templates.QWEN_3, [row(prompt=prompt)])) == 1


# ---- a template of one's own, and what templates are given

THINKING = "{% if not enable_thinking %}/no_think {% endif %}" + templates.SMOLLM2


def test_a_template_from_a_file_takes_the_place_of_the_tokenizers(reader: Reader, tmp_path: Path) -> None:
    expected = reader.texts(templates.SMOLLM2, [row()])
    file = tmp_path / "template.jinja"
    file.write_text(templates.SMOLLM2, encoding="utf-8")
    path = tmp_path / "pairs.jsonl"
    for own in (templates.FORGETFUL, None):
        spec = replace(save_tokenizer(tmp_path / "tokenizer", own), chat_template=str(file))
        data = DataConfig(train=[DataSource(path=str(path))])
        sample = prepare_dataset(data.train, data, spec, tmp_path / "cache").sample(0, load_tokenizer(spec))
        assert (sample.prompt, *sample.completions) == expected
    load_tokenizer(spec).save_pretrained(tmp_path / "trained")  # as a run does
    assert load_tokenizer(TokenizerSpec(str(tmp_path / "trained"))).chat_template == templates.SMOLLM2


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (None, r"=.*template.jinja cannot be read"),
        (" \n", r"=.*template.jinja is empty"),
        ("a\n{% for m in messages %}\n{% endif %}", r"=.*template.jinja:3: not a Jinja template \(.*endif"),
    ],
)
def test_files_that_are_no_template(tmp_path: Path, content: str | None, error: str) -> None:
    file = tmp_path / "template.jinja"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    with pytest.raises(ModelError, match=f"data.chat_template{error}"):
        load_tokenizer(replace(save_tokenizer(tmp_path / "tokenizer"), chat_template=str(file)))


def test_what_a_template_is_given_reaches_it_and_makes_other_data(reader: Reader) -> None:
    def prompt(**settings: Any) -> str:
        dataset = reader.data(THINKING, [row()], **settings)
        return dataset.sample(0, load_tokenizer(reader.spec)).prompt

    assert prompt() == "/no_think " + prompt(chat_template_kwargs={"enable_thinking": True})
    assert prompt(chat_template_kwargs={"enable_thinking": False}) == prompt()


def test_what_a_template_does_not_read_is_refused(reader: Reader) -> None:
    with pytest.raises(ModelError, match=r"kwargs.enable_thoughts: the chat template of .* does not read it"):
        reader.data(THINKING, [row()], chat_template_kwargs={"enable_thoughts": True})


@pytest.mark.parametrize("name", ["add_generation_prompt", "messages", "tools"])
def test_what_every_template_is_given_is_not_given_twice(reader: Reader, name: str) -> None:
    with pytest.raises(ModelError, match=rf"data.chat_template_kwargs.{name} is given to every chat template; leave"):
        reader.data(THINKING, [row()], chat_template_kwargs={name: True})


# ---- what is not looked for again

NO_SECRETS = (
    "{% for m in messages if not m['content'].startswith('secret') %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_template_that_leaves_out_certain_words(reader: Reader) -> None:
    """Rows of the same shape lose nothing, and are not looked through again; this one is."""
    rows = [row(prompt=[SYSTEM, {"role": "user", "content": text}]) for text in ("a", "b", "secret words")]
    with pytest.raises(DataError, match=r"pairs\.jsonl:3: the chat template leaves out message 2 .*not_rendered"):
        reader.data(NO_SECRETS, rows)


def test_rows_of_one_shape_are_rendered_once_each(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    stock = Renderer._render

    def counted(self: Renderer, *arguments: Any, **settings: Any) -> str:
        counts.append(1)
        return stock(self, *arguments, **settings)

    monkeypatch.setattr(Renderer, "_render", counted)
    reader.data(templates.SMOLLM2, [row()])
    first = len(counts)
    reader.data(templates.SMOLLM2, [row()] * 11)
    assert len(counts) - 2 * first == 3 * 10  # prompt, chosen, rejected
