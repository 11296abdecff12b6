"""Logs of production as preference data: each kind of event, versions, nothing twice, nothing lost."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from dpo_dist.cli import app
from dpo_dist.config import DataSource
from dpo_dist.data import PreferenceExample, RowFault, open_source
from dpo_dist.feedback import FeedbackSet, statements_of

THUMBS = {"prompt": "2 + 2?", "completion": "4", "label": True, "id": 7, "time": "2026-11-01", "model": "m1"}
EDIT = {"prompt": "Spell color", "completion": "colour", "corrected": "color"}
CHOICE = {"prompt": "Say hi", "completions": ["Hi", "Hello", "Go away"], "choice": 1}
RANKING = {"prompt": "Say hi", "completions": ["Hi", "Go away"], "scores": [1, 0]}
AGAIN = {"prompt": "Joke?", "completion": "No.", "regenerated": "Why not?"}
EVENTS = [THUMBS, {**THUMBS, "completion": "5", "label": False}, EDIT, CHOICE, AGAIN]


def write(path: Path, events: list[Any]) -> Path:
    path.write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    return path


def run_command(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(words))
    return result.exit_code, result.output


def said(text: str, role: str = "assistant") -> tuple[dict[str, str], ...]:
    return ({"role": role, "content": text},)


def read(folder: Path) -> list[PreferenceExample]:
    rows = list(open_source(DataSource(path=str(folder)), "data.train.0").examples())
    assert not [row for row in rows if isinstance(row, RowFault)]
    return [row for row in rows if isinstance(row, PreferenceExample)]


@pytest.fixture
def add(tmp_path: Path) -> Any:
    """`dpo-dist feedback add` of these events: exit code and output."""

    def run(events: list[Any], *options: str, name: str = "log.jsonl") -> tuple[int, str]:
        log = write(tmp_path / name, events)
        return run_command("feedback", "add", str(log), "--to", str(tmp_path / "set"), *options)

    return run


def test_every_kind_of_event_is_read_as_what_it_says(add: Any, tmp_path: Path) -> None:
    assert add(EVENTS)[0] == 0
    asked = {"thumbs": "2 + 2?", "edit": "Spell color", "choice": "Say hi", "again": "Joke?"}
    found = [(row.prompt, row.completions, row.rating, row.weight) for row in read(tmp_path / "set")]
    assert found == [
        (said(asked["thumbs"], "user"), (said("4"),), True, 1.0),
        (said(asked["thumbs"], "user"), (said("5"),), False, 1.0),
        (said(asked["edit"], "user"), (said("color"), said("colour")), None, 1.0),
        (said(asked["choice"], "user"), (said("Hello"), said("Hi")), None, 1.0),
        (said(asked["choice"], "user"), (said("Hello"), said("Go away")), None, 1.0),
        (said(asked["again"], "user"), (said("Why not?"), said("No.")), None, 1.0),
    ]
    table = pq.read_table(tmp_path / "set" / "train-0001.parquet").to_pylist()
    first = {name: table[0][f"feedback_{name}"] for name in ("kind", "source", "id", "time", "model")}
    assert first == {
        "kind": "thumbs", "source": f"{tmp_path}/log.jsonl:1", "id": "7", "time": "2026-11-01", "model": "m1"
    }  # fmt: skip


def test_conversations_columns_by_other_names_weights_and_plain_text(add: Any, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    events = [{"request": {"messages": talk}, "corrected": "Hello!"}, {"request": {"messages": talk}, "label": False}]
    code, output = add(events, "--columns", "messages=request.messages", "--weight", "edit=2")
    assert (code, "not read" in output) == (0, False)
    assert [(row.prompt, row.completions, row.pairs[0].weight) for row in read(tmp_path / "set")[:1]] == [
        (said("Hi", "user"), (said("Hello!"), said("Yo")), 2.0)
    ]
    assert add([EDIT], "--text", name="text.jsonl")[0] == 0
    assert (read(tmp_path / "set")[-1].prompt, read(tmp_path / "set")[-1].completions[0]) == ("Spell color", "color")


def test_what_was_said_before_is_not_added_again(add: Any, tmp_path: Path) -> None:
    assert "version 1 of 6 rows" in add([*EVENTS, EDIT])[1]
    before = (tmp_path / "set" / "train-0001.parquet").read_bytes()
    code, output = add([*EVENTS, {**EDIT, "corrected": "Color"}], name="second.jsonl")
    assert code == 0
    assert "6 statements said before, and not added again" in output
    assert "version 2 of 1 row (edit: 1)" in output and "7 rows in 2 versions" in output
    assert "nothing new for" in add(EVENTS, name="third.jsonl")[1]
    assert (tmp_path / "set" / "train-0001.parquet").read_bytes() == before
    versions = FeedbackSet(tmp_path / "set").versions()
    assert [(one.number, one.num_rows) for one in versions] == [(1, 6), (2, 1)]
    code, output = run_command("feedback", "show", str(tmp_path / "set"), "--json")
    assert [one["sources"][0]["events"] for one in json.loads(output)["versions"]] == [6, 6]


@pytest.mark.parametrize(
    "against",
    [{**EDIT, "completion": "color", "corrected": "colour"}, {**THUMBS, "label": False}],
    ids=["pair", "thumbs"],
)
def test_contradictions_are_counted_and_kept(add: Any, tmp_path: Path, against: dict[str, Any]) -> None:
    assert "note: " not in add([THUMBS, EDIT])[1]
    code, output = add([against], name="second.jsonl")
    assert code == 0
    assert f"note: rows that contradict another: 1, as in {tmp_path}/second.jsonl:1" in output
    assert FeedbackSet(tmp_path / "set").versions()[1].num_contradicting == 1


def test_a_choice_of_none_is_left_out_and_counted(add: Any) -> None:
    assert "1 event left out (tied: 1)" in add([{**CHOICE, "choice": None}, EDIT])[1]


def test_a_ranking_says_that_each_better_answer_is_better_than_each_worse_one(add: Any, tmp_path: Path) -> None:
    asked = {"prompt": "Say hi", "completions": ["Hi", "Go away", "Hello", "Hi"]}
    alike = {"prompt": "Why?", "completions": ["a", "b"], "scores": [1, 1], "choice": None}
    code, output = add([{**asked, "scores": [2, 0, 1.5, 2]}, alike], "--weight", "ranking=0.5")
    assert (code, "1 event left out (tied: 1)" in output, "version 1 of 3 rows (ranking: 3)" in output) == (0, 1, 1)
    rows = read(tmp_path / "set")
    expected = [("Hi", "Hello"), ("Hi", "Go away"), ("Hello", "Go away")]
    assert [row.completions for row in rows] == [(said(better), said(worse)) for better, worse in expected]
    assert all((row.prompt, row.pairs[0].weight) == (said("Say hi", "user"), 0.5) for row in rows)
    # The same as ranks says nothing new, and a choice that is made counts more than scores beside it.
    assert "3 statements said before" in add([{**asked, "ranks": [1, 3, 2, 1]}], name="ranks.jsonl")[1]
    code, output = add([{**CHOICE, "prompt": "Hi?", "scores": [9, 0, 0]}], name="choice.jsonl")
    assert (code, "version 2 of 2 rows (choice: 2)" in output) == (0, True)


def test_a_prompt_that_was_sampled_is_a_ranking(add: Any, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "Hi"}]
    answers = [[{"role": "assistant", "content": text}] for text in ("Yo", "Hello")]
    assert add([{"prompt": talk, "completions": answers, "scores": [0.0, 1.0]}])[0] == 0
    (row,) = read(tmp_path / "set")
    assert (row.prompt, row.completions) == (said("Hi", "user"), (said("Hello"), said("Yo")))


def test_what_a_prompt_has_beside_it_is_kept(add: Any, tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]
    events = [{**CHOICE, "system": "Be brief."}, {**EDIT, "tools": tools}, {**EDIT, "prompt": "Other", "weight": 3}]
    assert add(events, "--weight", "edit=0.5")[0] == 0
    first, _, second, third = read(tmp_path / "set")
    assert first.prompt[0] == {"role": "system", "content": "Be brief."}
    assert (second.tools, second.pairs[0].weight, third.pairs[0].weight) == (tuple(tools), 0.5, 1.5)
    # Another system message makes another statement.
    assert "version 2 of 2 rows" in add([{**CHOICE, "system": "Be long."}, *events], name="second.jsonl")[1]


@pytest.mark.parametrize("event", [{"completions": ["A", "B"], "choice": 1}, {"completion": "A", "regenerated": "B"}])
def test_the_answer_at_the_end_of_a_conversation_is_no_part_of_the_prompt(
    add: Any, tmp_path: Path, event: dict[str, Any]
) -> None:
    talk = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    assert add([{"messages": talk, **event}])[0] == 0
    (row,) = read(tmp_path / "set")
    assert (row.prompt, row.completions) == (said("Q", "user"), (said("B"), said("A")))


def test_votes_as_numbers_no_votes_and_answers_that_are_there_twice(add: Any, tmp_path: Path) -> None:
    events = [{**THUMBS, "label": 1}, {**THUMBS, "completion": "5", "label": 0}, {**THUMBS, "label": None}]
    code, output = add([*events, {**CHOICE, "completions": ["x", "y", "x"], "choice": 0}])
    assert (code, "1 event left out (tied: 1)" in output) == (0, True)
    rows = read(tmp_path / "set")
    assert [row.rating for row in rows] == [True, False, None]
    assert rows[2].completions == (said("x"), said("y"))


def test_columns_that_are_not_read_are_named(add: Any) -> None:
    assert "columns not read: session, user" in add([{**EDIT, "user": "u1", "session": 3}])[1]


def test_a_log_whose_name_is_no_text(tmp_path: Path) -> None:
    log = write(Path(os.fsdecode(os.fsencode(tmp_path) + b"/lat\xe9n.jsonl")), [EDIT])
    code, output = run_command("feedback", "add", str(log), "--to", str(tmp_path / "set"))
    assert code == 0, output


BAD = [
    ({"prompt": "Hi"}, "missing_column", "nothing tells what was said (the event has prompt); an event has label"),
    ({**CHOICE, "choice": 3}, "wrong_number", "choice=3 is no place in completions; give one from 0 to 2"),
    ({**CHOICE, "choice": True}, "wrong_number", "choice=True is no place in completions"),
    ({**CHOICE, "completions": ["Hi"]}, "wrong_type", "completions is no list of two or more"),
    (
        {"prompt": "Hi", "completions": ["a", "b"]},
        "missing_column",
        "nothing tells what was said (the event has prompt, completions); an event has label (thumbs), corrected "
        "(edit), completions with choice, scores or ranks",
    ),
    ({**RANKING, "scores": [1]}, "wrong_number", "scores has 1 values for 2 completions"),
    ({**RANKING, "ranks": [1, 2]}, "missing_column", "completions come with both scores and ranks"),
    ({**RANKING, "scores": [1, None]}, "missing_value", "scores[1] is null"),
    ({**RANKING, "completions": ["a", "a"]}, "identical_completions", "completion 1 is identical to completion 0"),
    ({**RANKING, "completions": ["a", " "]}, "empty_completion", "there is no answer"),
    ({"scores": [1, 0], "prompt": "Hi"}, "missing_column", "nothing tells what was said"),
    ({**EDIT, "completion": None}, "missing_column", "completion is missing or null"),
    ({**EDIT, "corrected": "colour"}, "identical_completions", "nothing was changed"),
    ({**EDIT, "corrected": " "}, "empty_completion", "there is no answer"),
    ({**THUMBS, "label": "up"}, "wrong_number", "label='up' is neither true nor false"),
    ({"messages": "Hi", "label": True}, "wrong_type", "messages is no list of messages"),
    ("no event", "wrong_type", "the row is of type str"),
    ({**EDIT, "id": "\ud800"}, "broken_text", "id holds half of a surrogate pair"),
    ({**THUMBS, "weight": 2}, "unread_column", "weight belongs to a pair"),
]


@pytest.mark.parametrize(("event", "reason", "what"), BAD)
def test_events_that_say_nothing(add: Any, tmp_path: Path, event: Any, reason: str, what: str) -> None:
    code, output = add([EDIT, event])
    assert code == 2
    assert f"log.jsonl:2: {what}" in output
    assert f"or give --skip-bad ({reason})" in output
    assert not (tmp_path / "set").exists()  # nothing was added
    code, output = add([EDIT, event], "--skip-bad")
    assert code == 0
    assert f"1 event left out ({reason}: 1)" in output and "version 1 of 1 row" in output


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--weight", "thumbs=2"], "thumbs is no kind of which rows have a weight; give one of choice, edit"),
        (["--weight", "edit=none"], "'none' is not a number above 0"),
        (["--weight", "edit=-1"], "'-1' is not a number above 0"),
        (["--columns", "prompt"], "--columns prompt: give NAME=PATH"),
        (["--columns", "promt=a"], "--columns promt=a: promt is nothing that an event has; give the path of one of"),
    ],
)
def test_mistakes_of_options(add: Any, options: list[str], error: str) -> None:
    code, output = add([EDIT], *options)
    assert (code, error in output) == (2, True)


def test_logs_and_sets_that_are_none(tmp_path: Path) -> None:
    for name, content, error in (("a.jsonl", None, "is no file"), ("a.csv", "x", "is not JSON by its name")):
        if content is not None:
            (tmp_path / name).write_text(content)
        code, output = run_command("feedback", "add", str(tmp_path / name), "--to", str(tmp_path / "set"))
        assert (code, error in output) == (2, True)
    code, output = run_command("feedback", "show", str(tmp_path / "set"))
    assert (code, "holds no feedback; add some with" in output) == (2, True)
    (tmp_path / "other").mkdir()
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other" / "train-0001.parquet")
    log = write(tmp_path / "log.jsonl", [EDIT])
    code, output = run_command("feedback", "add", str(log), "--to", str(tmp_path / "other"))
    assert (code, "train-0001.parquet is no version of a set of feedback" in output) == (2, True)


def test_a_kill_in_the_middle_leaves_the_set_as_it_was(add: Any, tmp_path: Path) -> None:
    assert add([EDIT])[0] == 0
    program = (
        "import os, signal, sys; from dpo_dist.feedback import store; from dpo_dist.cli.feeding import run_add\n"
        "from pathlib import Path\n"
        "store.sync = lambda path: os.kill(os.getpid(), signal.SIGKILL)\n"
        "run_add([Path(sys.argv[1])], Path(sys.argv[2]), [], [], False, False)"
    )
    log = write(tmp_path / "second.jsonl", EVENTS)
    killed = subprocess.run(
        [sys.executable, "-c", program, str(log), str(tmp_path / "set")], env=dict(os.environ), check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert [one.number for one in FeedbackSet(tmp_path / "set").versions()] == [1] and len(read(tmp_path / "set")) == 1
    assert "version 2 of 5 rows" in add(EVENTS, name="second.jsonl")[1]
    assert len(read(tmp_path / "set")) == 6


def test_statements_are_told_apart_by_what_they_say() -> None:
    (one,) = statements_of(EDIT, "f:1", False)  # pyright: ignore[reportGeneralTypeIssues]
    (other,) = statements_of({**EDIT, "id": 5}, "g:9", False)  # pyright: ignore[reportGeneralTypeIssues]
    assert (one.key, one.opposite) == (other.key, other.opposite) and one.key != one.opposite
