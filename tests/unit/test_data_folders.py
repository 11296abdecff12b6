"""Folders that other programs write, files that are damaged, and names that cannot be printed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from dpo_dist.config import DataSource
from dpo_dist.data import PreferenceExample, RowFault, open_source
from dpo_dist.errors import DataError

ROWS = [{"prompt": f"Say {n}.", "chosen": f" {n}", "rejected": " no"} for n in range(30)]
KEY = "data.train.0"


def read(path: Path | str, **settings: Any) -> list[PreferenceExample | RowFault]:
    return list(open_source(DataSource(path=str(path), **settings), KEY).examples())


def prompts(path: Path, **settings: Any) -> list[Any]:
    return [one.prompt for one in read(path, **settings) if isinstance(one, PreferenceExample)]


EXPECTED = [row["prompt"] for row in ROWS]


# ---- folders


def test_a_saved_data_set(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved", num_shards=3)
    assert prompts(tmp_path / "saved") == EXPECTED
    names = {one.source for one in read(tmp_path / "saved") if isinstance(one, PreferenceExample)}
    assert f"{tmp_path}/saved/data-00000-of-00003.arrow:1" in names


def test_a_saved_data_set_of_several_splits(tmp_path: Path) -> None:
    both = DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:2])})
    both.save_to_disk(tmp_path / "saved")
    assert prompts(tmp_path / "saved") == EXPECTED
    assert prompts(tmp_path / "saved", split="test") == EXPECTED[:2]
    with pytest.raises(DataError, match=r"data\.train\.0\.split=dev is not in the folder .*, which holds train, test"):
        read(tmp_path / "saved", split="dev")


def test_a_saved_selection_is_no_whole_file(tmp_path: Path) -> None:
    """Its files hold all rows, in their first order; which were chosen stands in a file of its own."""
    chosen = Dataset.from_list(ROWS).shuffle(seed=0).select(range(5))
    chosen.save_to_disk(tmp_path / "saved")
    try:
        found = prompts(tmp_path / "saved")
    except DataError as error:
        assert "flatten_indices" in str(error)
    else:
        assert found == [row["prompt"] for row in chosen]


@pytest.mark.parametrize(
    "damage", ["{", '{"_data_files": [{"filename": "data-9.arrow"}]}', '{"_data_files": [{"filename": "../x"}]}']
)
def test_a_saved_folder_that_is_not_whole(tmp_path: Path, damage: str) -> None:
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "state.json").write_text(damage)
    with pytest.raises(DataError, match=r"state\.json cannot be read|lacks .*copy the folder again"):
        read(tmp_path / "saved")


def test_a_clone_of_a_hub_repository(tmp_path: Path) -> None:
    (tmp_path / "clone" / "data").mkdir(parents=True)
    (tmp_path / "clone" / "README.md").write_text("---\n---\n")
    for number, rows in enumerate((ROWS[:20], ROWS[20:])):
        name = f"train-{number:05d}-of-00002.parquet"
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "clone" / "data" / name)
    pq.write_table(pa.Table.from_pylist(ROWS[:1]), tmp_path / "clone" / "data" / "test-00000-of-00001.parquet")
    assert prompts(tmp_path / "clone") == EXPECTED
    assert prompts(tmp_path / "clone", split="test") == EXPECTED[:1]


def test_shards_that_are_missing_or_of_two_versions(tmp_path: Path) -> None:
    for names in (
        ("train-00000-of-00003", "train-00002-of-00003"),
        ("train-00000-of-00001", "train-00000-of-00002", "train-00001-of-00002"),
    ):
        folder = tmp_path / names[0] / str(len(names))
        folder.mkdir(parents=True)
        for name in names:
            pq.write_table(pa.Table.from_pylist(ROWS[:2]), folder / f"{name}.parquet")
        with pytest.raises(DataError, match="does not hold every shard of split train once"):
            read(folder)


def test_descriptions_are_no_data_and_a_folder_below_is_named(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    (clone / "data").mkdir(parents=True)
    (clone / "dataset_infos.json").write_text("{}")
    pq.write_table(pa.Table.from_pylist(ROWS), clone / "data" / "train-00000-of-00001.parquet")
    assert prompts(clone) == EXPECTED
    (clone / "data").rename(clone / "default")
    with pytest.raises(DataError, match=r"no data file \(its folder default has some: name that one\)"):
        read(clone)


def test_a_pointer_of_git_lfs(tmp_path: Path) -> None:
    for name in ("pairs.jsonl", "pairs.parquet"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        with pytest.raises(DataError, match=r"is a pointer of Git LFS; run `git lfs pull`"):
            read(tmp_path / name)


def test_a_column_that_is_there_twice(tmp_path: Path) -> None:
    columns = [pa.array(["a"])] * 4
    table = pa.Table.from_arrays(columns, names=["prompt", "chosen", "rejected", "prompt"])
    pq.write_table(table, tmp_path / "pairs.parquet")
    with pytest.raises(DataError, match="column prompt is there 2 times"):
        read(tmp_path / "pairs.parquet")


# ---- damage


FLIPS = """
import random, sys
from pathlib import Path
from dpo_dist.config import DataSource
from dpo_dist.data import open_source
from dpo_dist.errors import DataError
path, draw, found = Path(sys.argv[1]), random.Random(0), 0
whole = path.read_bytes()
for _ in range(400):
    place, bit = draw.randrange(len(whole)), draw.randrange(8)
    path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :])
    try:
        list(open_source(DataSource(path=str(path)), "data.train.0").examples())
    except DataError as error:
        assert str(path) in str(error)
        found += 1
print(found)
"""


def test_a_damaged_arrow_file_never_ends_the_process(tmp_path: Path) -> None:
    """A wrong offset would be followed to wherever it leads."""
    table = pa.Table.from_pylist([{**row, "chosen": [{"role": "assistant", "content": row["chosen"]}]} for row in ROWS])
    path = tmp_path / "pairs.arrow"
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    done = subprocess.run([sys.executable, "-c", FLIPS, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 50, "some damage is found"


# ---- names


HALF = "\ud83d"


def test_half_of_a_character_in_the_name_of_a_column(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({**row, f"note{HALF}": 1}) + "\n" for row in ROWS[:2]))
    faults = read(path)
    assert all(isinstance(fault, RowFault) and fault.reason == "broken_text" for fault in faults)
    assert "'note\\ud83d'" in str(faults[0]) or "note\\ud83d" in faults[0].what  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "more",
    [
        {"tools": [{"type": "function", "function": {"name": f"clock{HALF}"}}]},
        {"tools": [{"type": "function", f"x{HALF}": 1}]},
        {"chosen": [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": HALF}}]}]},
        {"chosen": [{"role": "assistant", "content": "a", "reasoning_content": HALF}]},
    ],
    ids=["tool", "key", "call", "reasoning"],
)
def test_half_of_a_character_anywhere_in_a_row(tmp_path: Path, more: dict[str, Any]) -> None:
    message = [{"role": "assistant", "content": "no"}]
    row = {"prompt": [{"role": "user", "content": "Hi"}], "chosen": [{"role": "assistant", "content": "a"}]}
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({**row, "rejected": message, **more}) + "\n")
    (fault,) = read(path)
    assert isinstance(fault, RowFault) and fault.reason == "broken_text"
    fault.what.encode()


def test_values_nested_too_deep(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    deep = "[" * 700 + "]" * 700
    path.write_text(f'{{"prompt": "a", "chosen": "b", "rejected": "c", "tools": {deep}}}\n')
    (fault,) = read(path)
    assert isinstance(fault, RowFault)


# ---- a prompt that nobody read


@pytest.mark.parametrize("column", ["question", "instruction", "input", "query", "text", "user_input"])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_text_that_nobody_reads(tmp_path: Path, column: str, suffix: str) -> None:
    """The prompt was what both answers begin with: "The answer is f" + "our."."""
    row = {column: "What is 2 + 2?", "chosen": "The answer is four.", "rejected": "The answer is five."}
    path = tmp_path / f"pairs.{suffix}"
    if suffix == "jsonl":
        path.write_text(json.dumps(row) + "\n")
    else:
        pq.write_table(pa.Table.from_pylist([row]), path)
    (fault,) = read(path)
    assert isinstance(fault, RowFault) and fault.reason == "unread_column"
    assert f"there is no column prompt, and {column} would not be read" in fault.what


@pytest.mark.parametrize("value", [[{"role": "user", "content": "What is 2 + 2?"}], {"text": "What is 2 + 2?"}])
def test_a_question_of_messages_that_nobody_reads(tmp_path: Path, value: Any) -> None:
    row = {"question": value, "chosen": "The answer is four.", "rejected": "The answer is five."}
    for path in (tmp_path / "pairs.jsonl", tmp_path / "pairs.parquet"):
        if path.suffix == ".jsonl":
            path.write_text(json.dumps(row) + "\n")
        else:
            pq.write_table(pa.Table.from_pylist([row]), path)
        (fault,) = read(path)
        assert isinstance(fault, RowFault) and fault.reason == "unread_column"


def test_a_question_beside_answers_as_messages(tmp_path: Path) -> None:
    """The prompt would be the system message, or nothing."""
    answers = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"system": "Be brief.", "question": "2 + 2?", **answers}) + "\n")
    (fault,) = read(path)
    assert isinstance(fault, RowFault) and fault.reason == "unread_column"


def test_longer_text_than_the_prompt_is_taken_for_one(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    row = {"frage": "Was ist zwei plus zwei, bitte?", "chosen": "Das ist vier.", "rejected": "Das ist acht."}
    path.write_text(json.dumps(row) + "\n")
    (fault,) = read(path)
    assert isinstance(fault, RowFault) and "frage would not be read" in fault.what


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_labels_that_nobody_reads_are_no_prompt(tmp_path: Path, suffix: str) -> None:
    row = {
        "user_id": "u17",
        "prompt_id": "p-1",
        "source": "open hh",
        "chosen": "The answer is four.",
        "rejected": "The answer is five.",
    }
    path = tmp_path / f"pairs.{suffix}"
    if suffix == "jsonl":
        path.write_text(json.dumps(row) + "\n")
    else:
        pq.write_table(pa.Table.from_pylist([row]), path)
    ignored: set[str] = set()
    (example,) = open_source(DataSource(path=str(path)), KEY).examples(ignored)
    assert isinstance(example, PreferenceExample) and ignored == {"user_id", "prompt_id", "source"}
