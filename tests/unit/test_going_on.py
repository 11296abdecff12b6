"""A process that is killed while it tokenises is gone on from: the same files, and no row is tokenised twice."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.config import DataConfig, DataSource
from dpo_dist.errors import DataError
from dpo_dist.tokenization import TokenizerSpec, journal, prepare_dataset, processes, writer
from dpo_dist.tokenization.processes import RowProcesses
from tests.byte_tokenizer import save_tokenizer

GROUP, BATCH, COUNT = 7, 5, 60


class Killed(BaseException):
    """As a signal that nothing of ours catches."""


def pair(k: int) -> dict[str, Any]:
    return {"prompt": f"p{k}", "chosen": f" yes {k}" * (1 + k % 4), "rejected": f" no {k}", "weight": 1.0 + k % 3}


def mixed(k: int) -> dict[str, Any]:
    if k % 11 == 3:
        return {"prompt": f"p{k}", "chosen": " same", "rejected": " same"}  # left out
    if k % 7 == 5:
        return {"prompt": f"p{k}", "completions": [" a", " b", " c"], "scores": [3, 1, 2], "extra": k}
    return pair(k)


def rating(k: int) -> dict[str, Any]:
    return {"prompt": f"p{k % 9}", "completion": f" said {k}", "label": k % 2 == 0}


STORIES: dict[str, tuple[list[list[dict[str, Any]]], dict[str, Any], dict[str, Any]]] = {
    "pairs": ([[pair(k) for k in range(COUNT)]], {}, {}),
    "two sources": ([[mixed(k) for k in range(30)], [mixed(k) for k in range(100, 130)]], {"on_bad_row": "skip"}, {}),
    "trained part": ([[pair(k) for k in range(COUNT)]], {"holdout": 0.3}, {"part": "trained"}),
    "ratings": ([[rating(k) for k in range(COUNT)]], {}, {"rated": "all"}),
}


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A journal after each group of a few rows, and batches of other sizes."""
    monkeypatch.setattr(journal, "EVERY_S", 0.0)
    monkeypatch.setattr(processes, "ROWS_PER_GROUP", GROUP)
    monkeypatch.setattr(writer, "_ROWS_PER_BATCH", BATCH)


class Work:
    """A data set that is prepared with kills."""

    def __init__(self, folder: Path, spec: TokenizerSpec, story: str, monkeypatch: pytest.MonkeyPatch) -> None:
        files, settings, self.more = STORIES[story]
        sources = []
        for number, rows in enumerate(files):
            path = folder / f"{number}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            sources.append(DataSource(path=str(path)))
        self.spec, self.folder, self.data = spec, folder, DataConfig(train=sources, num_proc=1, **settings)
        self.num_groups, self.patch = 0, monkeypatch

    def prepare(self, cache: str, kill_after: int | None = None) -> Path:
        """The folder; or a kill after some groups."""
        encoded, self.num_groups = RowProcesses.encoded, 0

        def counted(own: RowProcesses, rows: Any) -> Iterator[Any]:
            for group in encoded(own, rows):
                if self.num_groups == kill_after:
                    raise Killed
                self.num_groups += 1
                yield group

        with self.patch.context() as patch:
            patch.setattr(RowProcesses, "encoded", counted)
            prepare_dataset(self.data.train, self.data, self.spec, self.folder / cache, **self.more)
        (found,) = (self.folder / cache).glob("[!.]*/")
        assert not list((self.folder / cache).glob(".*"))
        return found


@pytest.fixture
def spec(tmp_path: Path) -> TokenizerSpec:
    return save_tokenizer(tmp_path / "tokenizer")


def same(one: Path, other: Path) -> bool:
    assert sorted(path.name for path in one.iterdir()) == ["examples.arrow", "summary.json"]
    return all((one / path.name).read_bytes() == path.read_bytes() for path in other.iterdir())


@pytest.mark.parametrize("story", STORIES)
def test_a_kill_after_any_group(
    tmp_path: Path, spec: TokenizerSpec, story: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    work = Work(tmp_path, spec, story, monkeypatch)
    whole = work.prepare("whole")
    num_groups = work.num_groups
    assert num_groups >= 9
    for kill_after in range(1, num_groups):
        cache = f"killed{kill_after}"
        with pytest.raises(Killed):
            work.prepare(cache, kill_after)
        assert same(work.prepare(cache), whole)
        assert work.num_groups <= num_groups - kill_after + 1  # a group that was not written down is made again
    assert "going on after" in caplog.text and "cannot be gone on from" not in caplog.text


def test_many_kills_and_a_damaged_file(
    tmp_path: Path, spec: TokenizerSpec, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    work = Work(tmp_path, spec, "two sources", monkeypatch)
    whole, groups = work.prepare("whole"), work.num_groups
    for _ in range(groups - 1):
        with pytest.raises(Killed):
            work.prepare("often", kill_after=1)
    assert same(work.prepare("often"), whole) and work.num_groups <= 2
    for damage in ("flipped", "cut", "journal", "gone"):
        with pytest.raises(Killed):
            work.prepare(damage, kill_after=6)
        (partial,) = (tmp_path / damage).glob(".*/")
        arrow, written = partial / "examples.arrow", partial / "journal.json"
        content = bytearray(arrow.read_bytes())
        if damage == "flipped":
            content[len(content) // 2] ^= 1
            arrow.write_bytes(content)
        elif damage == "cut":
            arrow.write_bytes(content[: len(content) // 2])
        elif damage == "journal":
            written.write_text(written.read_text().replace('"num_read"', '"read"'))
        else:
            arrow.unlink()
        assert same(work.prepare(damage), whole) and work.num_groups == groups
        assert "cannot be gone on from" in caplog.text
        caplog.clear()


def test_rows_that_refuse_a_run_leave_nothing(tmp_path: Path, spec: TokenizerSpec, monkeypatch: Any) -> None:
    work = Work(tmp_path, spec, "two sources", monkeypatch)
    work.data = work.data.model_copy(update={"on_bad_row": "error"})
    with pytest.raises(DataError, match="identical"):
        work.prepare("refused")
    assert not list((tmp_path / "refused").glob(".*/")) and not list((tmp_path / "refused").glob("[!.]*/"))


@pytest.mark.parametrize("settings", [{"group_by_prompt": True}, {}])
def test_where_rows_wait_for_others_all_are_read_again(
    tmp_path: Path, spec: TokenizerSpec, monkeypatch: pytest.MonkeyPatch, settings: dict[str, bool]
) -> None:
    work = Work(tmp_path, spec, "pairs" if settings else "ratings", monkeypatch)
    work.more, work.data = {}, work.data.model_copy(update=settings)
    whole, groups = work.prepare("whole"), work.num_groups
    with pytest.raises(Killed):
        work.prepare("killed", kill_after=5)
    assert same(work.prepare("killed"), whole) and work.num_groups == groups
