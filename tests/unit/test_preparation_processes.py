"""Rows tokenised by several processes: the same bytes as by one, faults told as by one, and nothing left behind."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from dpo_dist.config import DataConfig, DataSource
from dpo_dist.control_groups import usable_cores
from dpo_dist.errors import DataError, ModelError, WorkerLostError
from dpo_dist.tokenization import TokenizerSpec, prepare_dataset, processes
from tests.byte_tokenizer import save_tokenizer

ANSWER, OTHER = ([{"role": "assistant", "content": text}] for text in ("yes", "no"))
FAULTY: list[Any] = [
    {"prompt": "p", "chosen": "c", "rejected": "c"},
    {"prompt": "p", "chosen": "c", "rejected": ""},
    {"prompt": "p", "chosen": "c"},
    {"prompt": 3, "chosen": "c", "rejected": "d"},
    {"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7]},
    {"prompt": [{"role": "nobody", "content": "?"}], "chosen": ANSWER, "rejected": OTHER},
    {"prompt": "p", "chosen": "c" * 99, "rejected": "d"},
    {"prompt": "p", "completions": ["a", "b"], "scores": [1, 1]},
    {"prompt": "p", "chosen": "c", "rejected": "d", "weight": -1},
    {"prompt": "p", "chosen": "\ud800", "rejected": "d"},
    "no row",
]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Groups and a beginning of a few rows, workers awaited; and no child is left when a test ends."""
    monkeypatch.setattr(processes, "ROWS_PER_GROUP", 7)
    monkeypatch.setattr(processes, "ROWS_ALONE", 14)
    monkeypatch.setattr(processes.RowProcesses, "_is_ready", _wait_until_ready)
    before = set(psutil.Process().children())
    yield
    assert set(psutil.Process().children()) <= before


def _wait_until_ready(self: processes.RowProcesses) -> bool:
    while self._free() is None:
        self._receive({})
    return True


@pytest.fixture
def spec(tmp_path: Path) -> TokenizerSpec:
    return save_tokenizer(tmp_path / "tokenizer")


@pytest.fixture
def prepare(tmp_path: Path, spec: TokenizerSpec) -> Callable[..., Path]:
    """Tokenise lines with `num_proc` processes, in a cache of its own each time; returns the data set's folder."""
    number = 0

    def prepared(lines: list[str], **settings: Any) -> Path:
        nonlocal number
        number += 1
        path, cache = tmp_path / "pairs.jsonl", tmp_path / f"cache{number}"
        path.write_text("".join(line + "\n" for line in lines))
        source = DataSource(path=str(path), limit=settings.pop("limit", None))
        try:
            prepare_dataset([source], DataConfig(train=[source], **settings), spec, cache)
            (folder,) = (path for path in cache.iterdir() if path.is_dir())
            return folder
        finally:
            assert not list(cache.glob(".*")), "a partial folder"

    return prepared


def rows(count: int, seed: int = 0) -> list[Any]:
    """Strings, messages and rankings, some with a column that means nothing, some that repeat a prompt."""
    draw, found = random.Random(seed), list[Any]()
    for n in range(count):
        prompt = f"p{draw.randrange(count // 2)}" + "\n" * draw.randrange(3)
        kind = draw.randrange(3)
        if kind == 0:
            found.append(
                {"prompt": prompt, "chosen": f"\nc{n}", "rejected": "r" * draw.randrange(1, 9), f"x{n % 5}": 1}
            )
        elif kind == 1:
            asked = [{"role": "user", "content": prompt}]
            answers = [[{"role": "assistant", "content": f"{word}{n}"}] for word in ("yes", "no")]
            found.append({"prompt": asked, "chosen": answers[0], "rejected": answers[1], "weight": 1 + n / 4})
        else:
            found.append({"prompt": prompt, "completions": [f"a{n}", "b", "c"], "scores": [n, 0.5, -1]})
    return found


def lines(of: list[Any]) -> list[str]:
    return [json.dumps(row) for row in of]


def faulty_lines() -> list[str]:
    """Every kind of fault, at its place or one of its places in any group."""
    found, draw = lines(rows(260)), random.Random(1)
    for fault in [*lines(FAULTY * 2), "{", '{"prompt": "cut', "[" * 600 + "]" * 600]:
        found.insert(draw.randrange(3, len(found)), fault)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "settings",
    [
        {"max_length": 60, "truncation_mode": "drop"},
        {"max_length": 30, "truncation_mode": "keep_start", "group_by_prompt": True},
        {"limit": 111, "pairing": "adjacent"},
    ],
    ids=["dropped", "cut-and-grouped", "limited"],
)
def test_any_number_of_processes_writes_the_same_bytes(prepare: Callable[..., Path], settings: dict[str, Any]) -> None:
    expected = prepare(faulty_lines(), on_bad_row="skip", num_proc=1, **settings)
    summary = json.loads((expected / "summary.json").read_text())
    assert len(summary["bad_rows"]) >= 5 and len(summary["ignored_columns"]) == 5
    assert settings.get("max_length") != 30 or {"truncated", "merged_by_prompt"} <= set(summary["notes"])
    for num_proc in (2, 3):
        found = prepare(faulty_lines(), on_bad_row="skip", num_proc=num_proc, **settings)
        assert found.name == expected.name, "no part of the name: the next run finds it"
        assert contents(found) == contents(expected), num_proc


def test_bad_rows_are_refused_in_the_same_words(prepare: Callable[..., Path]) -> None:
    said = []
    for num_proc in (1, 3):
        with pytest.raises(DataError) as caught:
            prepare(faulty_lines(), num_proc=num_proc)
        said.append(str(caught.value))
    assert said[0] == said[1] and "of 285 rows cannot be used" in said[0]


def test_an_error_of_a_worker_is_raised_here(prepare: Callable[..., Path], spec: TokenizerSpec) -> None:
    """Here there is no chat template for a row that a worker reads."""
    save_tokenizer(Path(spec.path), template=None)
    (Path(spec.path) / "chat_template.jinja").unlink(missing_ok=True)
    strings = [row for row in rows(300) if isinstance(row["prompt"], str)]
    messages = {"prompt": [{"role": "user", "content": "?"}], "chosen": ANSWER, "rejected": OTHER}
    said = []
    for num_proc in (1, 2):
        with pytest.raises(
            ModelError, match=r"has no chat template, and .*pairs\.jsonl:51 holds chat messages"
        ) as caught:
            prepare(lines([*strings[:50], messages, *strings[50:]]), num_proc=num_proc)
        said.append(str(caught.value))
    assert said[0] == said[1]


def test_what_cannot_be_sent_is_done_here(prepare: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = contents(prepare(lines(rows(60)), num_proc=1))

    class Unpicklable(dict[str, Any]):
        def __reduce__(self) -> Any:
            raise TypeError("an open file")

    grouped = processes._grouped

    def with_such_a_row(found: Any) -> Any:
        return grouped((where, Unpicklable(row)) if where.endswith("30") else (where, row) for where, row in found)

    monkeypatch.setattr(processes, "_grouped", with_such_a_row)
    assert contents(prepare(lines(rows(60)), num_proc=2)) == expected


@pytest.mark.parametrize("when", ["before it is ready", "while it works"])
def test_a_worker_that_is_killed(prepare: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    start, hand_out, killed = processes.RowProcesses._start, processes.RowProcesses._hand_out, list[int]()

    def kill(self: processes.RowProcesses) -> None:
        if not killed:
            killed.append(self._workers[0].process.pid)
            os.kill(killed[0], signal.SIGKILL)

    def started(self: processes.RowProcesses) -> None:
        start(self)
        kill(self)

    def handed_out(self: processes.RowProcesses, *arguments: Any) -> None:
        hand_out(self, *arguments)
        kill(self)

    if when == "while it works":
        monkeypatch.setattr(processes.RowProcesses, "_hand_out", handed_out)
    else:
        monkeypatch.setattr(processes.RowProcesses, "_start", started)
    says = r"^data\.num_proc=4: a process that tokenises was ended by SIGKILL, .*; set data\.num_proc=2, or"
    with pytest.raises(WorkerLostError, match=says):
        prepare(lines(rows(400)), num_proc=4)
    assert killed


def test_workers_are_no_ranks_and_deaf_to_requests_to_stop(
    prepare: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    hand_out, seen = processes.RowProcesses._hand_out, list[dict[str, str]]()

    def handed_out(self: processes.RowProcesses, worker: Any, *arguments: Any) -> None:
        if not seen:
            seen.append(psutil.Process(worker.process.pid).environ())
            for number in processes._ASKED_TO_END:
                worker.process.send_signal(number)
        hand_out(self, worker, *arguments)

    monkeypatch.setattr(processes.RowProcesses, "_hand_out", handed_out)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "3")
    expected = contents(prepare(lines(rows(60)), num_proc=1))
    assert contents(prepare(lines(rows(60)), num_proc=2)) == expected
    (environment,) = seen
    assert not environment.keys() & {"RANK", "WORLD_SIZE", "LOCAL_RANK"}
    assert (environment["OMP_NUM_THREADS"], environment["TOKENIZERS_PARALLELISM"]) == ("1", "false")


def test_a_tokenizer_that_changes_meanwhile(
    prepare: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, spec: Any
) -> None:
    start = processes.RowProcesses._start

    def started(self: processes.RowProcesses) -> None:
        save_tokenizer(Path(spec.path), template="{{ messages }}")
        start(self)

    monkeypatch.setattr(processes.RowProcesses, "_start", started)
    with pytest.raises(DataError, match="changed while data were tokenised; wait until"):
        prepare(lines(rows(60)), num_proc=2)


PARENT = """
import sys
from pathlib import Path
from dpo_dist.config import DataConfig, DataSource
from dpo_dist.tokenization import TokenizerSpec, prepare_dataset, processes

processes.ROWS_PER_GROUP, processes.ROWS_ALONE = 7, 14
rows, tokenizer, cache = sys.argv[1:]
source = DataSource(path=rows)
prepare_dataset([source], DataConfig(train=[source], num_proc=2), TokenizerSpec(tokenizer), Path(cache))
"""


def test_workers_end_when_their_parent_is_killed(tmp_path: Path, spec: TokenizerSpec) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(line + "\n" for line in lines(rows(20_000))))
    # A fresh process: a test process that has run for long is too large to be forked.
    child = subprocess.Popen([sys.executable, "-c", PARENT, str(path), spec.path, str(tmp_path / "cache")])
    parent, deadline = psutil.Process(child.pid), time.monotonic() + 120
    while len(workers := parent.children()) < 2 or not list((tmp_path / "cache").glob(".*/*.arrow")):
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.01)
    child.kill()
    child.wait()
    gone, alive = psutil.wait_procs(workers, timeout=30)
    assert len(gone) == 2 and not alive


def test_few_rows_start_no_process(prepare: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes.RowProcesses, "_start", lambda self: pytest.fail("started"))
    prepare(lines(rows(14)), num_proc=2)
    prepare(lines(rows(60)), num_proc=1)


@pytest.mark.parametrize(
    ("cores", "num_proc", "is_text", "expected"),
    [(3, None, True, 3), (64, None, True, 8), (3, None, False, 1), (3, 5, True, 5), (3, 5, False, 5)],
)
def test_the_setting_says_how_many(
    monkeypatch: pytest.MonkeyPatch, cores: int, num_proc: int | None, is_text: bool, expected: int
) -> None:
    monkeypatch.setattr(processes, "usable_cores", lambda: cores)
    data = DataConfig(train=[DataSource(path="unread")], num_proc=num_proc)
    encoder: Any = processes.RowEncoder(data, None, "", False)
    work = processes.Work(data, TokenizerSpec("unread") if is_text else None, "", False)
    assert processes.RowProcesses(encoder, work, None)._num_proc == expected


@pytest.mark.parametrize(("quota", "expected"), [(None, 6), (2.5, 2), (0.5, 1), (9.0, 6)])
def test_usable_cores(monkeypatch: pytest.MonkeyPatch, quota: float | None, expected: int) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)))
    monkeypatch.setattr("dpo_dist.control_groups.cores_of_container", lambda: quota)
    assert usable_cores() == expected
