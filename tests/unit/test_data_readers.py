"""What people have, read as it is: other names, patterns, CSV, zstd, forms of public data sets, parts of a set."""

import csv
import itertools
import json
import re
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest

from dpo_dist.config import DataSource, load_config
from dpo_dist.data import PreferenceExample, RowFault, open_source
from dpo_dist.errors import DataError
from tests.unit.test_data import STRINGS, write

KEY = "data.train.0"


def read(path: Path | str, **settings: Any) -> list[PreferenceExample | RowFault]:
    return list(open_source(DataSource(path=str(path), **settings), KEY).examples())


def bare(rows: list[PreferenceExample | RowFault]) -> list[Any]:
    """Without where they come from."""
    assert all(isinstance(row, PreferenceExample) for row in rows), rows
    return [(row.prompt, row.completions, row.pairs, row.weight) for row in rows if isinstance(row, PreferenceExample)]


# ---- columns

NESTED = [
    {"q": f"Say {n}.", "answers": [{"text": f" {n}", "by": "a"}, {"text": " no"}], "meta": {"sure": {"weight": 2.0}}}
    for n in range(3)
]
PATHS = {"prompt": "q", "chosen": "answers.0.text", "rejected": "answers.1.text", "weight": "meta.sure.weight"}


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "arrow"])
def test_columns_by_other_names_and_inside_of_others(tmp_path: Path, suffix: str) -> None:
    found = bare(read(write(tmp_path / f"rows.{suffix}", NESTED), columns=PATHS))
    expected = bare(read(write(tmp_path / "expected.jsonl", [row | {"weight": 2.0} for row in STRINGS])))
    assert found == expected


def test_every_item_of_a_list(tmp_path: Path) -> None:
    rows = [{"question": "Hi", "replies": [{"text": "a", "votes": 3}, {"text": "b", "votes": 1}, {"text": "c"}]}]
    rows[0]["replies"][2]["votes"] = 2
    columns = {"prompt": "question", "completions": "replies.*.text", "scores": "replies.*.votes"}
    (example,) = read(write(tmp_path / "rows.jsonl", rows), columns=columns)
    assert isinstance(example, PreferenceExample)
    assert example.completions == ("a", "b", "c")
    assert {(pair.chosen, pair.rejected, pair.margin) for pair in example.pairs} == {(0, 1, 2), (0, 2, 1), (2, 1, 1)}


def test_a_name_with_dots_is_one_name(tmp_path: Path) -> None:
    rows = [{"a.b": row["prompt"], **{key: row[key] for key in ("chosen", "rejected")}} for row in STRINGS]
    assert bare(read(write(tmp_path / "rows.parquet", rows), columns={"prompt": "a.b"})) == bare(
        read(write(tmp_path / "plain.jsonl", STRINGS))
    )


def test_a_column_may_take_the_place_of_another(tmp_path: Path) -> None:
    """`prompt` of this file is something else; and what is read under another name is no ignored column."""
    rows = [{**row, "prompt": "a system's name", "question": row["prompt"]} for row in STRINGS]
    source = open_source(
        DataSource(path=str(write(tmp_path / "rows.parquet", rows)), columns={"prompt": "question"}), KEY
    )
    ignored: set[str] = set()
    assert [row.prompt for row in source.examples(ignored) if isinstance(row, PreferenceExample)] == [
        row["prompt"] for row in STRINGS
    ]
    assert ignored == set()


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("qq", r"no column qq \(data.train.0.columns.prompt=qq\); the columns are q, answers, meta: correct the path"),
        ("answers.2.text", r"leads to nothing in this row \(a list of 2 has no item 2\)"),
        ("answers.0.words", r"no field words among text, by"),
        ("answers.0.text.x", r"x is looked up in a value of type str"),
        ("q.*", r"\* asks for a list, and there is a value of type str"),
    ],
)
def test_paths_that_lead_nowhere(tmp_path: Path, path: str, error: str) -> None:
    rows = read(write(tmp_path / "rows.jsonl", NESTED), columns=PATHS | {"prompt": path})
    assert len(rows) == 3
    for row in rows:
        assert isinstance(row, RowFault)
        assert row.reason in ("missing_column", "wrong_type")
        assert re.search(error, f"{row.what}; {row.way_out}")


def test_a_path_that_no_row_of_a_file_can_follow_is_the_files_fault(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows.parquet:1: no column qq \(data.train.0.columns.prompt=qq\)"):
        read(write(tmp_path / "rows.parquet", NESTED), columns=PATHS | {"prompt": "qq"})


def test_a_column_that_nobody_reads_is_no_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.train.0.columns.promt is not a column that is read; give .* prompt"):
        read(write(tmp_path / "rows.jsonl", NESTED), columns={"promt": "q"})


def test_columns_and_fraction_are_part_of_what_data_are_found_by(tmp_path: Path) -> None:
    path = str(write(tmp_path / "rows.jsonl", NESTED))
    several = [{}, {"columns": {"prompt": "q"}}, {"columns": {"prompt": "meta"}}, {"fraction": 0.5}, {"limit": 1}]
    found = [open_source(DataSource(path=path, **settings), KEY).identity() for settings in several]
    assert all(one != other for k, one in enumerate(found) for other in found[:k])


def test_a_column_that_a_path_leads_into_keeps_its_own_name(tmp_path: Path) -> None:
    """UltraFeedback's completions are read as well, and so is the text that a path takes a part of."""
    row = PUBLISHED["UltraFeedback"][0]
    fine = [item | {"fine": k} for k, item in enumerate(row["completions"])]
    path = write(tmp_path / "rows.jsonl", [row | {"completions": fine}])
    (example,) = read(path, columns={"scores": "completions.*.fine"})
    assert isinstance(example, PreferenceExample)
    assert (example.pairs[0].chosen, example.pairs[0].margin) == (1, 1.0)


# ---- files


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_csv_is_the_same_as_any_other_file(tmp_path: Path) -> None:
    rows = [{**row, "chosen": f'{row["chosen"]}\n"quoted", and\r\nmore', "weight": 0.5} for row in STRINGS]
    found = read(write_csv(tmp_path / "rows.csv", rows))
    assert bare(found) == bare(read(write(tmp_path / "rows.jsonl", rows)))
    assert [row.source for row in found] == [f"{tmp_path}/rows.csv:{line}" for line in (2, 5, 8)]  # where they begin


def test_csv_tells_text_from_what_is_none(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    answers = [[{"role": "assistant", "content": word}] for word in ("Hello", "What?")]
    as_json = {"prompt": messages, "chosen": answers[0], "rejected": answers[1], "weight": 3}
    rows = [{name: json.dumps(value) for name, value in as_json.items()}]
    assert bare(read(write_csv(tmp_path / "chat.csv", rows))) == bare(read(write(tmp_path / "chat.jsonl", [as_json])))
    json_answers = [{"prompt": "p", "chosen": '[{"a": 1}]', "rejected": '[{"a": 2}]'}]
    expected = bare(read(write(tmp_path / "json.jsonl", json_answers)))
    assert bare(read(write_csv(tmp_path / "json.csv", json_answers))) == expected
    plain = [{"q": "1", "chosen": "[1, 2]", "rejected": "null", "weight": ""}]
    (example,) = read(write_csv(tmp_path / "plain.csv", plain), columns={"prompt": "q"})
    assert isinstance(example, PreferenceExample)
    assert (example.prompt, example.completions, example.weight) == ("1", ("[1, 2]", "null"), 1.0)
    ranked = [{"prompt": "a", "completions": '["b", "c"]', "scores": "[1, 2.5]"}]
    (example,) = read(write_csv(tmp_path / "ranked.csv", ranked))
    assert isinstance(example, PreferenceExample)
    assert example.pairs[0].margin == 1.5


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        ("prompt,chosen,rejected\na,b\n", 2, "the row has 2 values for 3 columns"),
        ('prompt,chosen,rejected\na,b,c\n"a,b,c\n', 3, "not CSV (unexpected end of data); close the quote"),
        ("prompt,chosen,chosen\na,b,c\n", 1, "column chosen is there more than once"),
        ("prompt,chosen,rejected\n", 1, "the file has no rows"),
    ],
)
def test_faults_of_csv(tmp_path: Path, content: str, line: int, message: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(content, encoding="utf-8")
    try:
        faults = [f"{row.source}: {row.what}" for row in read(path) if isinstance(row, RowFault)]
    except DataError as error:
        faults = [str(error)]
    assert len(faults) == 1
    assert faults[0].startswith(f"{path}:{line}: ")
    assert message in faults[0]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "arrow", "csv"])
def test_zstd(tmp_path: Path, suffix: str) -> None:
    plain = tmp_path / f"rows.{suffix}"
    (write_csv if suffix == "csv" else write)(plain, STRINGS)
    path = tmp_path / f"rows.{suffix}.zst"
    path.write_bytes(pa.compress(plain.read_bytes(), codec="zstd", asbytes=True))
    assert bare(read(path)) == bare(read(plain))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=rf"{path}:\d+: cannot be read from here on .*the file is damaged"):
        read(path)


def test_an_arrow_stream_that_was_cut_between_two_batches(tmp_path: Path) -> None:
    table, path = pa.Table.from_pylist(STRINGS), tmp_path / "rows.arrow"
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    assert len(read(path)) == 3
    path.write_bytes(path.read_bytes()[:-8])  # as a writer leaves it that was killed
    with pytest.raises(DataError, match=r"rows.arrow:1: the stream has no end: cut off\?"):
        read(path)


def test_a_pattern_is_its_files_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "parts").mkdir()
    for n, row in enumerate(STRINGS):
        write(tmp_path / "parts" / f"pairs-{n}.jsonl", [row])
    write(tmp_path / "parts" / "other.jsonl", [])
    rows = read(tmp_path / "parts" / "pairs-*.jsonl")
    assert [(row.prompt, row.source) for row in rows if isinstance(row, PreferenceExample)] == [
        (row["prompt"], f"{tmp_path}/parts/pairs-{n}.jsonl:1") for n, row in enumerate(STRINGS)
    ]
    with pytest.raises(DataError, match=r"path=.*none-\*.jsonl matches no file \(looked from .*; correct the pattern"):
        read(tmp_path / "none-*.jsonl")
    # As every path, it is looked up beside the configuration too.
    config = tmp_path / "run.yaml"
    config.write_text("model: {model_name_or_path: demo}\ndata: {train: [{path: 'parts/pairs-?.jsonl'}]}\n"
                      "train: {output_dir: out}\n", encoding="utf-8")  # fmt: skip
    monkeypatch.chdir("/")
    assert load_config(config).data.train[0].path == f"{tmp_path}/parts/pairs-?.jsonl"


def test_a_configuration_and_revision_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []

    def load_dataset(*names: Any, **settings: Any) -> datasets.Dataset:
        asked.append((names, settings))
        return datasets.Dataset.from_list(STRINGS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read("owner/name", name="small", revision="v2", split="test")
    assert asked == [(("owner/name", "small"), {"split": "test", "revision": "v2"})]
    assert rows[0].source == "owner/name/small[test]:1"
    for setting in ({"name": "small"}, {"revision": "v2"}):
        with pytest.raises(DataError, match=r"data.train.0.(name|revision)=.* belongs to a hub id, and .* is on this"):
            read(write(tmp_path / "rows.jsonl", STRINGS), **setting)


# ---- forms of public data sets


def asked(question: str, *answers: str) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": question}],
        "completions": [[{"role": "assistant", "content": answer}] for answer in answers],
    }


PUBLISHED = {
    "UltraFeedback": (
        {
            "source": "evol", "instruction": "2 + 2?", "models": ["a", "b"], "correct_answers": ["None"],
            "completions": [
                {"model": "a", "response": "4", "overall_score": 8.5, "annotations": {"honesty": {"Rating": "5"}}},
                {"model": "b", "response": "5", "overall_score": 3.0, "annotations": {"honesty": {"Rating": "1"}}},
            ],
        },
        {**asked("2 + 2?", "4", "5"), "scores": [8.5, 3.0]},
    ),
    "HelpSteer 2": (
        {"split": "train", "prompt": "2 + 2?", "response_1": "5", "response_2": "4", "preference_strength": 2},
        {**asked("2 + 2?", "5", "4"), "scores": [0, 2]},
    ),
    "HelpSteer 3": (
        {
            "context": [{"role": "user", "content": "2 + 2?"}], "response1": "4", "response2": "5",
            "overall_preference": -3, "language": "english", "individual_preference": [{"score": -3}],
        },
        {**asked("2 + 2?", "4", "5"), "scores": [3, 0]},
    ),
    "Nectar": (
        {
            "prompt": "\n\nHuman: 2 + 2?\n\nAssistant: ", "turns": 1, "num_responses": 3, "good_natured": True,
            "answers": [{"answer": "four", "model": "a", "rank": 2.0}, {"answer": "4", "model": "b", "rank": 1.0},
                        {"answer": "5", "model": "c", "rank": 3.0}],
        },
        {**asked("2 + 2?", "four", "4", "5"), "ranks": [2, 1, 3]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "jsonl.gz"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_rows_as_they_are_published(tmp_path: Path, name: str, suffix: str) -> None:
    row, same = PUBLISHED[name]
    assert bare(read(write(tmp_path / f"rows.{suffix}", [row]))) == bare(read(write(tmp_path / "s.jsonl", [same])))


@pytest.mark.parametrize(
    ("name", "changes", "reason", "what"),
    [
        ("HelpSteer 2", {"preference_strength": 0}, "tied", "all completions are ranked alike"),
        ("HelpSteer 2", {"preference_strength": None}, "missing_value", "scores[0] is null"),
        ("HelpSteer 3", {"overall_preference": "none"}, "wrong_number", "overall_preference='none' is not a number"),
        ("HelpSteer 3", {"response1": None}, "wrong_type", "response1 is of type NoneType"),
        ("UltraFeedback", {"instruction": " "}, "empty_prompt", "the prompt is empty"),
        (
            "UltraFeedback",
            {"completions": [{"response": "4"}, {"response": 5}]},
            "wrong_type",
            "completions[1].response",
        ),
        (
            "Nectar",
            {"answers": [{"answer": "4", "rank": 1.5}, {"answer": "5", "rank": 1.0}]},
            "wrong_number",
            "ranks[0]",
        ),
    ],
)
def test_faults_of_published_rows(tmp_path: Path, name: str, changes: dict[str, Any], reason: str, what: str) -> None:
    (row,) = read(write(tmp_path / "rows.jsonl", [PUBLISHED[name][0] | changes]))
    assert isinstance(row, RowFault)
    assert row.reason == reason
    assert what in row.what


DIALOGUE = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "2 + 2?"},
]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("HelpSteer 2", "Hi\n\n<extra_id_1>Assistant\nHello\n\n<extra_id_1>User\n2 + 2?"),
        ("HelpSteer 2", "Hi\n<extra_id_1>Assistant\nHello\n<extra_id_1>User\n2 + 2?\n"),
        ("Nectar", "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: 2 + 2?\n\nAssistant: "),
    ],
)
def test_dialogues_in_one_text_become_turns(tmp_path: Path, name: str, text: str) -> None:
    (example,) = read(write(tmp_path / "rows.jsonl", [PUBLISHED[name][0] | {"prompt": text}]))
    assert isinstance(example, PreferenceExample)
    assert list(example.prompt) == DIALOGUE


def test_scores_that_a_path_names_come_before_the_published_ones(tmp_path: Path) -> None:
    row = PUBLISHED["UltraFeedback"][0]
    path = write(tmp_path / "rows.jsonl", [row | {"fine": [1, 2]}])
    (example,) = read(path, columns={"scores": "fine"})
    assert isinstance(example, PreferenceExample)
    assert (example.pairs[0].chosen, example.pairs[0].margin) == (1, 1.0)


# ---- content in parts


def test_parts_of_text_are_text(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "2 + 2"}, {"text": "?"}]
    row = {"prompt": [{"role": "user", "content": parts}], "chosen": [{"role": "assistant", "content": "4"}]}
    rows = [row | {"rejected": [{"role": "assistant", "content": [{"type": "text", "text": "5"}]}]}]
    (example,) = read(write(tmp_path / "rows.jsonl", rows))
    assert isinstance(example, PreferenceExample)
    assert example.prompt == ({"role": "user", "content": "2 + 2?"},)
    assert example.completions[1] == ({"role": "assistant", "content": "5"},)


@pytest.mark.parametrize(
    ("part", "what"),
    [
        ({"type": "image_url", "image_url": {"url": "x.png"}}, "prompt[0].content[1] is a part of type 'image_url'"),
        ({"type": "text"}, "prompt[0].content[1]={'type': 'text'}"),
        ("words", "prompt[0].content[1]='words'"),
    ],
)
def test_parts_that_are_no_text_are_named(tmp_path: Path, part: Any, what: str) -> None:
    prompt = [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, part]}]
    answers = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    (row,) = read(write(tmp_path / "rows.jsonl", [{"prompt": prompt, **answers}]))
    assert isinstance(row, RowFault)
    assert row.reason == "unread_column"
    assert f"{what}, which is no text" in row.what


# ---- a share of the rows


@pytest.mark.parametrize(("fraction", "limit"), [(0.25, None), (0.1, 37), (1 / 3, 90), (0.99, None), (1.0, 10)])
def test_a_share_of_the_rows_is_spread_evenly(tmp_path: Path, fraction: float, limit: int | None) -> None:
    rows = [{"prompt": f"{n}", "chosen": "a", "rejected": "b"} for n in range(100)]
    path = write(tmp_path / "rows.jsonl.gz", rows)
    found = [
        int(str(row.prompt)) for row in read(path, fraction=fraction, limit=limit) if not isinstance(row, RowFault)
    ]
    total = limit or 100
    assert len(found) == int(total * fraction + 1e-9)
    gaps = [later - earlier for earlier, later in itertools.pairwise(found)]
    assert max(gaps, default=1) - min(gaps, default=1) <= 1
    assert max(found) < total
