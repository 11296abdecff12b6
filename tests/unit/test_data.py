"""Rows of every accepted shape, from every kind of file, and the text of every fault."""

import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_dist.config import DataSource
from dpo_dist.data import Pair, PreferenceExample, RowFault, open_source
from dpo_dist.data.rows import parse_row
from dpo_dist.errors import DataError

REPOSITORY = Path(__file__).parents[2]
SHARED_DATA = REPOSITORY.parent / "shared" / "data"
needs_shared_data = pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="needs ../shared/data")

STRINGS = [{"prompt": f"Say {n}.", "chosen": f" {n}", "rejected": " no"} for n in range(3)]
USER, GOOD, BAD = (
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "assistant", "content": "What?"},
)
TOOL = {"type": "function", "function": {"name": "clock", "parameters": {}}}


def read(path: Path | str, **settings: Any) -> list[PreferenceExample | RowFault]:
    return list(open_source(DataSource(path=str(path), **settings), "data.train.0").examples())


def texts(path: Path) -> list[str]:
    """What a user is told of each row; "" of one that can be used."""
    return [f"{row.source}: {row.what}; {row.way_out}" if isinstance(row, RowFault) else "" for row in read(path)]


def write(path: Path, rows: list[Any]) -> Path:
    """Rows in the format that the name says."""
    name, compressed = path.name.removesuffix(".gz"), path.suffix == ".gz"
    plain = path.with_name(name)
    if name.endswith(".jsonl"):
        plain.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif name.endswith(".json"):
        plain.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), plain, row_group_size=2)
    else:
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(plain), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    if compressed:
        path.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    return path


def parsed(row: dict[str, Any]) -> PreferenceExample:
    example = parse_row(row, "f:1")
    assert isinstance(example, PreferenceExample), example
    return example


# ---- files


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "arrow"])
@pytest.mark.parametrize("compressed", ["", ".gz"])
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str, compressed: str) -> None:
    path = write(tmp_path / f"pairs.{suffix}{compressed}", STRINGS)
    examples = read(path)
    assert [(e.prompt, *e.completions) for e in examples if isinstance(e, PreferenceExample)] == [
        (row["prompt"], row["chosen"], row["rejected"]) for row in STRINGS
    ]
    # A row of the indented array takes five lines, and the first begins after the bracket.
    lines = [2, 7, 12] if suffix == "json" else [1, 2, 3]
    assert [e.source for e in examples] == [f"{path}:{line}" for line in lines]


def test_arrow_stream_as_the_datasets_library_writes_it(tmp_path: Path) -> None:
    datasets.Dataset.from_list(STRINGS).save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    assert [e.source for e in read(file)] == [f"{file}:{line}" for line in (1, 2, 3)]


def test_json_lines_under_a_json_name_blank_lines_and_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "pairs.json"
    text = "\ufeff" + "\n\n".join(json.dumps(row) for row in STRINGS) + "\n\n"
    path.write_text(text, encoding="utf-8")
    assert [e.source for e in read(path)] == [f"{path}:{line}" for line in (1, 3, 5)]


def test_limit_counts_rows_from_the_start(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", STRINGS)
    assert [e.source for e in read(path, limit=2)] == [f"{path}:1", f"{path}:2"]


def test_folder_of_splits_and_of_shards(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", STRINGS)
    write(tmp_path / "test-00000-of-00002.parquet", STRINGS[:1])
    write(tmp_path / "test-00001-of-00002.parquet", STRINGS[1:])
    (tmp_path / "README.md").write_text("not data")
    assert [e.source for e in read(tmp_path)] == [f"{tmp_path}/train.jsonl:{line}" for line in (1, 2, 3)]
    shards = [f"{tmp_path}/test-0000{n}-of-00002.parquet" for n in (0, 1)]
    assert [e.source for e in read(tmp_path, split="test")] == [f"{shards[0]}:1", f"{shards[1]}:1", f"{shards[1]}:2"]


def test_hub_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub itself is out of reach in tests: its client is asked for the right thing, and its rows are read."""
    asked: list[Any] = []

    def load_dataset(path: str, name: str | None, split: str, revision: str | None) -> datasets.Dataset:
        asked.append((path, name, split, revision))
        return datasets.Dataset.from_list(STRINGS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    examples = read("Anthropic/hh-rlhf", split="test", limit=2)
    assert asked == [("Anthropic/hh-rlhf", None, "test", None)]
    assert [e.source for e in examples] == ["Anthropic/hh-rlhf[test]:1", "Anthropic/hh-rlhf[test]:2"]


# ---- row shapes


def test_strings_with_explicit_prompt() -> None:
    row = {"prompt": "P", "chosen": "c", "rejected": "r", "score": 3, "tools": None, "images": []}
    assert parsed(row) == PreferenceExample("P", ("c", "r"), (Pair(0, 1),), None, "f:1")


@pytest.mark.parametrize("dialogue", [[USER], [{"role": "system", "content": "Be brief."}, USER, GOOD, USER]])
def test_messages_with_explicit_and_implicit_prompt_are_the_same(dialogue: list[Any]) -> None:
    explicit = parsed({"prompt": dialogue, "chosen": [GOOD], "rejected": [BAD]})
    implicit = parsed({"chosen": [*dialogue, GOOD], "rejected": [*dialogue, BAD]})
    assert explicit == implicit
    assert explicit == PreferenceExample(tuple(dialogue), ((GOOD,), (BAD,)), (Pair(0, 1),), None, "f:1")


SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize("dialogue", [[USER], [SYSTEM, USER], [SYSTEM, USER, GOOD, {**USER, "content": "And?"}]])
@pytest.mark.parametrize("prompt", ["Hi", " Hi\n"])
def test_a_prompt_that_repeats_the_first_user_message_of_whole_conversations(dialogue: list[Any], prompt: str) -> None:
    """The layout of UltraFeedback-binarized."""
    implicit = {"chosen": [*dialogue, GOOD], "rejected": [*dialogue, BAD]}
    assert parsed({"prompt": prompt, **implicit}) == parsed(implicit)


@pytest.mark.parametrize("column", ["prompt", "conversations"])
def test_whole_conversations_that_begin_with_the_prompts_messages(column: str) -> None:
    row = {column: [SYSTEM, USER], "chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]}
    assert parsed(row) == parsed({"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD]})


def test_answers_that_begin_with_the_prompts_own_words_are_kept_whole() -> None:
    example = parsed({"prompt": [GOOD], "chosen": [GOOD, USER, GOOD], "rejected": [GOOD, USER, BAD]})
    assert example.completions == ((GOOD, USER, GOOD), (GOOD, USER, BAD))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "Hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": [SYSTEM, USER, GOOD], "rejected": [USER, BAD]},
        {"conversations": [USER], "chosen": GOOD, "rejected": BAD},
        {"conversations": [SYSTEM, USER], "chosen": GOOD, "rejected": BAD},
    ],
)
def test_system_column_beside_messages_of_every_shape(row: dict[str, Any]) -> None:
    assert parsed({**row, "system": "Be brief."}).prompt == (SYSTEM, USER)


@pytest.mark.parametrize("system", [None, "", " \n"])
def test_a_system_column_that_says_nothing(system: str | None) -> None:
    assert parsed({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "system": system}).prompt == (USER,)
    assert parsed({"prompt": "P", "chosen": "c", "rejected": "r", "system": system}).prompt == "P"
    ids = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
    assert parsed({**ids, "system": system}).prompt == (1,)


def test_implicit_prompt_of_strings_leaves_the_space_to_the_completions() -> None:
    example = parsed({"chosen": "The sky is blue.", "rejected": "The sky is green."})
    assert (example.prompt, example.completions) == ("The sky is", (" blue.", " green."))


def test_sharegpt_with_system_column_and_turn() -> None:
    row = {
        "conversations": [{"from": "human", "value": "Hi"}],
        "chosen": {"from": "gpt", "value": "Hello!"},
        "rejected": {"from": "gpt", "value": "What?"},
    }
    assert parsed(row) == parsed({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]})
    system = {"role": "system", "content": "Be brief."}
    turn = {"from": "system", "value": "Be brief."}
    assert parsed({**row, "system": "Be brief."}).prompt == (system, USER)
    assert parsed({**row, "conversations": [turn, *row["conversations"]]}).prompt == (system, USER)


def test_hh_dialogue_is_cut_after_the_last_assistant_turns_name() -> None:
    start = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    example = parsed({"chosen": f"{start} yes", "rejected": f"{start} yesterday"})
    assert (example.prompt, example.completions) == (start, (" yes", " yesterday"))


def test_token_ids_pass_through() -> None:
    example = parsed({"prompt_ids": [1, 0], "chosen_ids": [5], "rejected_ids": [6, 7]})
    assert (example.prompt, example.completions) == ((1, 0), ((5,), (6, 7)))


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
def test_tools_and_a_completion_that_only_calls_one(tools: Any) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "clock"}}]}
    example = parsed({"prompt": [USER], "chosen": [call], "rejected": [BAD], "tools": tools})
    assert example.tools == (TOOL,)
    assert example.completions[0] == ({**call, "content": ""},)


def test_keys_that_parquet_invents_are_dropped(tmp_path: Path) -> None:
    """One schema for all rows gives every message every key: `tool_calls: null` is not a call."""
    call = {**GOOD, "tool_calls": [{"function": {"name": "clock", "arguments": {"zone": "UTC"}}}]}
    rows = [
        {"prompt": [USER], "chosen": [call], "rejected": [BAD]},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    ]
    first, second = read(write(tmp_path / "pairs.parquet", rows))
    assert isinstance(first, PreferenceExample) and isinstance(second, PreferenceExample)
    assert first.completions == ((call,), (BAD,))
    assert (second.prompt, second.completions) == ((USER,), ((GOOD,), (BAD,)))


SCORES = {"score_chosen": 7.5, "source": "web"}


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "arrow"])
@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({**STRINGS[0], "images": None, "tools": None}, set()),
        ({**STRINGS[0], **SCORES}, {"score_chosen", "source"}),
        (
            {"chosen": [USER, GOOD], "rejected": [USER, BAD], "system": "Be brief.", **SCORES},
            {"score_chosen", "source"},
        ),
        ({"conversations": [USER], "chosen": GOOD, "rejected": BAD, "prompt": "Hi"}, {"prompt"}),
        ({"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3], **STRINGS[0]}, {"prompt", "chosen", "rejected"}),
    ],
)
def test_ignored_columns_are_named(tmp_path: Path, suffix: str, row: dict[str, Any], names: set[str]) -> None:
    path, ignored = write(tmp_path / f"pairs.{suffix}", [row, row]), set[str]()
    examples = list(open_source(DataSource(path=str(path)), "data.train.0").examples(ignored))
    assert [type(example) for example in examples] == [PreferenceExample] * 2
    assert ignored == names


# ---- row faults


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "P", "chosen": "c", "rejected": "c"}, "identical_completions"),
        ({"chosen": "c", "rejected": "c"}, "identical_completions"),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "identical_completions"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [GOOD]}, "identical_completions"),
        ({"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [2]}, "identical_completions"),
        ({"prompt": "P", "chosen": "c", "rejected": " \n"}, "empty_completion"),
        ({"prompt": [USER], "chosen": [], "rejected": [BAD]}, "empty_completion"),
        ({"prompt": [USER], "chosen": [{**GOOD, "content": ""}], "rejected": [BAD]}, "empty_completion"),
        ({"chosen": [USER], "rejected": [USER, BAD]}, "empty_completion"),
        ({"prompt_ids": [1], "chosen_ids": [], "rejected_ids": [2]}, "empty_completion"),
        ({"chosen": "\n\nHuman: a\n\nAssistant:", "rejected": "\n\nHuman: a\n\nAssistant: b"}, "empty_completion"),
        ({"prompt": "", "chosen": "c", "rejected": "r"}, "empty_prompt"),
        ({"prompt": [], "chosen": [GOOD], "rejected": [BAD]}, "empty_prompt"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "empty_prompt"),
        ({"chosen": "yes", "rejected": "no"}, "empty_prompt"),
        ({"prompt_ids": [], "chosen_ids": [1], "rejected_ids": [2]}, "empty_prompt"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: c", "rejected": "\n\nHuman: b\n\nAssistant: c"}, "prompts_differ"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: c", "rejected": "\n\nHuman: a"}, "prompts_differ"),
        ({"chosen": [USER, GOOD], "rejected": [{**USER, "content": "Ho"}, GOOD]}, "prompts_differ"),
        ({"prompt": "Hi", "chosen": [USER, GOOD], "rejected": [{**USER, "content": "Ho"}, BAD]}, "prompts_differ"),
        ({"prompt": "Hi", "chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "identical_completions"),
        ({"prompt": [USER], "chosen": [USER], "rejected": [USER, BAD]}, "empty_completion"),
        ({"prompt": "P", "chosen": None, "rejected": "r"}, "missing_value"),
        ({"prompt": None, "chosen": "c", "rejected": "r"}, "missing_value"),
        ({"chosen": [USER, GOOD], "rejected": None}, "missing_value"),
        ({"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": None}, "missing_value"),
    ],
)
def test_row_faults(row: dict[str, Any], reason: str) -> None:
    fault = parse_row(row, "pairs.jsonl:7")
    assert isinstance(fault, RowFault)
    assert (fault.reason, fault.source) == (reason, "pairs.jsonl:7")


# ---- file faults


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "P", "rejected": "r"}, "no column chosen (the row has prompt, rejected)"),
        ({"text": "P"}, "no column chosen"),
        ({"prompt_ids": [1], "chosen_ids": [1]}, "no column rejected_ids"),
        ({"prompt": "P", "chosen": [GOOD], "rejected": [BAD]}, "prompt is a string, chosen and rejected are not"),
        (
            {"prompt": "Ho", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            "prompt is a string, and not the first user",
        ),
        ({"chosen": "c", "rejected": [BAD]}, "chosen is a string, rejected is not"),
        ({"prompt": 1, "chosen": 2, "rejected": 3}, "prompt=1 is of the wrong type (int); give a list of messages"),
        ({"prompt": [USER], "chosen": ["c"], "rejected": [BAD]}, "chosen[0]='c' is of the wrong type (str)"),
        ({"prompt": [USER], "chosen": [USER, GOOD], "rejected": [BAD]}, "chosen begins with a message of role 'user'"),
        ({"prompt": [{"content": "x"}], "chosen": [GOOD], "rejected": [BAD]}, "prompt[0] has no role"),
        ({"prompt": [{**USER, "content": 1}], "chosen": [GOOD], "rejected": [BAD]}, "prompt[0].content=1 is of"),
        ({"prompt": [{"role": "user"}], "chosen": [GOOD], "rejected": [BAD]}, "prompt[0].content=None is of"),
        (
            {"conversations": [{"from": "bot", "value": "x"}], "chosen": GOOD, "rejected": BAD},
            "from='bot' is unknown",
        ),
        ({"conversations": [USER], "chosen": "c", "rejected": "r"}, "chosen='c' is of the wrong type"),
        ({"conversations": [USER], "system": 3, "chosen": GOOD, "rejected": BAD}, "system=3 is of the wrong type"),
        ({"prompt": "P", "chosen": "c", "rejected": "r", "system": "Be"}, "system is set, and rows of strings have no"),
        ({"chosen": "say c", "rejected": "say r", "system": "Be"}, "write it into the prompt and remove the column"),
        (
            {"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD], "system": "Be"},
            "prompt begins with another system message; keep one of the two",
        ),
        ({"chosen": [USER, GOOD], "rejected": [SYSTEM, USER, BAD], "system": "Be"}, "rejected begins with another"),
        (
            {"prompt_ids": [1], "chosen_ids": [1], "rejected_ids": [2], "system": "Be"},
            "system is set, and the token ids are used as they are; remove the column system",
        ),
        ({"prompt_ids": [1], "chosen_ids": [1], "rejected_ids": [2], "tools": [TOOL]}, "tools is set, and the token"),
        ({"prompt_ids": [1, -2], "chosen_ids": [1], "rejected_ids": [2]}, "prompt_ids[1]=-2 is of the wrong type"),
        ({"prompt_ids": [True], "chosen_ids": [1], "rejected_ids": [2]}, "prompt_ids[0]=True is of the wrong type"),
        ({"prompt_ids": "1 2", "chosen_ids": [1], "rejected_ids": [2]}, "prompt_ids='1 2' is of the wrong type (str)"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "tools": "{"}, "tools is not JSON"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "tools": "3"}, "tools=3 is of the wrong type (int)"),
        ({"prompt": "P", "chosen": "c", "rejected": "r", "tools": [TOOL]}, "nothing shows them to the model"),
        ({"prompt": "P", "chosen": "c", "rejected": "r", "images": ["a.png"]}, "images are not supported"),
        ({"prompt": "P", "chosen": "\ud800", "rejected": "r"}, "chosen holds half of a surrogate pair at character 0"),
    ],
)
def test_faults_of_a_row_name_the_line(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "pairs.jsonl", [row])
    (text,) = texts(path)
    assert re.search(f"^{re.escape(str(path))}:1: .*{re.escape(message)}", text)


GOOD_LINE = json.dumps(STRINGS[0]).encode()


@pytest.mark.parametrize(
    ("name", "content", "line", "message"),
    [
        (
            "a.json",
            b'[\n{"prompt":\n"abc',
            3,
            "(Unterminated string starting at column 1, and the file ends after column 4",
        ),
        ("a.json", b"[" + GOOD_LINE, 1, "',' or ']' expected after a row, and the file ends: cut off?)"),
        ("a.jsonl", b"[" * 100_000, 1, "broken JSON ("),
        ("a.jsonl", b"", 1, "the file has no rows"),
        ("a.jsonl", b"\n \n", 1, "the file has no rows"),
        ("a.json", b"[]", 1, "the file has no rows"),
        ("a.json", b"[\n" + GOOD_LINE + b',\n{"prompt" 1}]', 3, "broken JSON (Expecting ':' delimiter"),
        ("a.json", b"[\n" + GOOD_LINE + b"\n" + GOOD_LINE + b"]", 3, "',' or ']' expected after a row"),
        ("a.json", b"[\n" + GOOD_LINE + b",\n]", 3, "broken JSON (Expecting value"),
        ("a.json", b"[" + GOOD_LINE + b"\n", 2, "',' or ']' expected after a row"),
        ("a.json", b"[" + GOOD_LINE + b"]\n{}", 1, "more text after the array"),
        ("a.jsonl.gz", gzip.compress(GOOD_LINE, mtime=0)[:12], 1, "the file is damaged"),
        ("a.jsonl.gz", GOOD_LINE, 1, "the file is damaged or not of its type"),
        ("a.parquet", b"PAR1 no parquet", 1, "the file is damaged or not of its type"),
        ("a.parquet.gz", b"no gzip", 1, "the file is damaged or not of its type"),
        ("a.arrow", b"no arrow file", 1, "the file is damaged or not of its type"),
        ("a.arrow", b"", 1, "cannot be read from here on"),
    ],
)
def test_file_faults_name_the_line(tmp_path: Path, name: str, content: bytes, line: int, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}:{line}: .*{re.escape(message)}"):
        read(path)


@pytest.mark.parametrize(
    ("name", "content", "line", "message"),
    [
        ("a.jsonl", GOOD_LINE + b'\n{"prompt": \n', 2, "broken JSON (Expecting value"),
        ("a.jsonl", b'{"prompt" 1}\n', 1, "broken JSON (Expecting ':' delimiter at column 11); give"),
        (
            "a.jsonl",
            GOOD_LINE + b'\n{"prompt": "abc\n',
            2,
            "(Unterminated string starting at column 12, and the line ends after column 15: cut off?); give",
        ),
        (
            "a.jsonl",
            b'{"prompt": \r\n',
            1,
            "(Expecting value at column 11, and the line ends after column 10: cut off?)",
        ),
        ("a.jsonl", b'{"prompt": "a"', 1, "(Expecting ',' delimiter at column 15, and the line ends after column 14"),
        ("a.jsonl", GOOD_LINE + b"\n3\n", 2, "the row is of type int"),
        ("a.jsonl", GOOD_LINE + b'\n\n{"prompt": "\xff"}', 3, "byte 13 of the line is not UTF-8"),
        ("a.json", b"[\n\n3]", 3, "the row is of type int"),
    ],
)
def test_a_bad_line_is_a_fault_of_its_row(tmp_path: Path, name: str, content: bytes, line: int, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    *before, text = texts(path)
    assert re.search(f"^{re.escape(str(path))}:{line}: .*{re.escape(message)}", text)
    assert before == [""] * (GOOD_LINE in content)


def test_rows_behind_a_bad_line_are_read(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\n".join([GOOD_LINE, b"{", b"3", b"\xff", b'{"id": 1}', GOOD_LINE, b""]))
    first, *faults, last = read(path)
    assert isinstance(first, PreferenceExample) and isinstance(last, PreferenceExample)
    assert last.source == f"{path}:6"
    reasons = [(fault.reason, fault.source) for fault in faults if isinstance(fault, RowFault)]
    assert reasons == [
        ("broken_json", f"{path}:2"),
        ("wrong_type", f"{path}:3"),
        ("broken_text", f"{path}:4"),
        ("missing_column", f"{path}:5"),
    ]


def test_truncated_gzip_gives_its_whole_lines_first(tmp_path: Path) -> None:
    rows = [{**STRINGS[0], "rejected": str(n) * 50} for n in range(2000)]
    path = write(tmp_path / "pairs.jsonl.gz", rows)
    path.write_bytes(path.read_bytes()[:-2000])
    seen = []
    with pytest.raises(DataError) as caught:
        for example in open_source(DataSource(path=str(path)), "data.train.0").examples():
            seen.append(example)
    assert 0 < len(seen) < 2000
    assert str(caught.value).startswith(f"{path}:{len(seen) + 1}: cannot be read from here on")


def test_invalid_utf8_in_arrow_names_its_row(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["P", "P"], "chosen": ["c", "c"], "rejected": ["r", "r"]})
    path = tmp_path / "pairs.arrow"
    broken = pa.array([b"r", b"\xff"]).view(pa.string())
    table = table.set_column(2, "rejected", broken)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    first, second = texts(path)
    assert first == "" and second.startswith(f"{path}:2: a string is not UTF-8")


def test_parquet_of_something_else_names_its_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.parquet", [{"text": "x", "label": 1}])
    with pytest.raises(DataError, match="none of the columns text, label is a preference"):
        read(path)


def test_text_and_token_ids_in_one_source(tmp_path: Path) -> None:
    ids = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
    path = write(tmp_path / "pairs.jsonl", [ids, ids, STRINGS[0]])
    text = f"{path}:3: the row holds text, earlier rows hold token ids; use one kind per source"
    assert texts(path) == ["", "", text]


def test_a_row_without_text_does_not_decide_what_the_source_holds(tmp_path: Path) -> None:
    ids = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
    path = write(tmp_path / "pairs.jsonl", [3, {"id": 1}, ids])
    source = open_source(DataSource(path=str(path)), "data.train.0")
    assert source.holds_token_ids()
    assert isinstance(list(source.examples())[2], PreferenceExample)


# ---- settings that name no data


@pytest.mark.parametrize("path", ["nowhere/at/all", "missing.jsonl", "owner/missing.jsonl.gz", "../missing", "a b"])
def test_a_missing_path_is_not_looked_up_on_the_hub(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(DataError, match=re.escape(f"data.train.0.path={path} does not exist (looked for {tmp_path}/")):
        open_source(DataSource(path=path), "data.train.0")


def test_hub_errors_say_what_was_tried_and_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*names: str | None, **settings: str | None) -> None:
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError) as caught:
        open_source(DataSource(path="owner/name", split="x"), "data.train.0")
    message = str(caught.value)
    assert message.startswith("data.train.0.path=owner/name is not a local file or folder")
    assert (
        "split x of the hub data set cannot be loaded (ConnectionError: Couldn't reach 'owner/name' on the Hub)"
        in message
    )
    assert "correct path, name, revision or split, go online, or download the data set and give the" in message


def test_settings_that_do_not_fit_what_is_there(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", STRINGS)
    with pytest.raises(DataError, match=r"data\.train\.0\.split=test has no effect on the single file"):
        read(path, split="test")
    with pytest.raises(
        DataError, match=r"data\.train\.0\.split=test is not in the folder .*, which holds train\.jsonl;"
    ):
        read(tmp_path, split="test")
    write(tmp_path / "train.parquet", STRINGS)
    with pytest.raises(DataError, match=r"holds split train more than once \(train\.jsonl, train\.parquet\)"):
        read(tmp_path)
    other = tmp_path / "pairs.xlsx"
    other.write_text("prompt,chosen\n")
    with pytest.raises(DataError, match=r"pairs\.xlsx is not a file of a known type; give one of \.jsonl, \.json"):
        read(other)


def test_unreadable_file(tmp_path: Path) -> None:
    """Gone between opening and reading: unreadable even to root."""
    path = write(tmp_path / "pairs.jsonl", STRINGS)
    source = open_source(DataSource(path=str(path)), "data.train.0")
    path.unlink()
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}:1: cannot be read"):
        source.identity()


# ---- real data


def test_the_projects_own_pairs_are_whole() -> None:
    for name, count in (("train", 48), ("evaluation", 12)):
        examples = read(REPOSITORY / "configs" / "demo" / f"{name}.jsonl")
        assert [type(example) for example in examples] == [PreferenceExample] * count
        assert len({str(example.prompt) for example in examples if isinstance(example, PreferenceExample)}) == count


@needs_shared_data
def test_hh_rlhf_as_it_is_published() -> None:
    path = SHARED_DATA / "hh_rlhf_harmless.jsonl.gz"
    examples = read(path)
    reasons = Counter(example.reason for example in examples if isinstance(example, RowFault))
    assert (len(examples), reasons) == (2000, {"empty_completion": 4, "prompts_differ": 4})
    faults = [example for example in examples if isinstance(example, RowFault) and example.reason == "prompts_differ"]
    assert faults[0].source == f"{path}:1255"
