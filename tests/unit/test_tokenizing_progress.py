"""What is shown while data are tokenised: how far the reading has come, a bar on a terminal, lines elsewhere."""

import gzip
import io
import json
import logging
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from datasets import Dataset

from dpo_dist.config import DataSource
from dpo_dist.data import Source, open_source
from dpo_dist.tokenization import progress

ROWS = [{"prompt": f"Say {n}.", "chosen": f" {n}" * 9, "rejected": " no"} for n in range(4000)]
TEXT = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def written(folder: Path, name: str) -> str:
    path = folder / name
    if name.endswith((".parquet", ".csv")):
        (Dataset.from_list(ROWS).to_parquet if name.endswith(".parquet") else Dataset.from_list(ROWS).to_csv)(path)
    elif name.endswith(".arrow"):
        table = pa.Table.from_pylist(ROWS)
        make = pa.ipc.new_file if name.startswith("file") else pa.ipc.new_stream
        with make(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=500)
    elif name.endswith(".json"):
        path.write_text(json.dumps(ROWS))
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(TEXT))
    elif name.endswith(".zst"):
        with pa.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(TEXT)
    else:
        path.write_bytes(TEXT)
    return str(path)


def shares(source: Source) -> list[float]:
    return [share for _ in source.rows() if (share := source.meter.share) is not None]


NAMES = ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "a.csv", "a.parquet", "file.arrow", "stream.arrow"]


@pytest.mark.parametrize("name", NAMES)
def test_the_share_grows(tmp_path: Path, name: str) -> None:
    source = open_source(DataSource(path=written(tmp_path, name)), "data.train.0")
    for _ in range(2):  # a source is read any number of times
        found = shares(source)
        assert len(found) == len(ROWS)
        assert found == sorted(found)
        assert found[0] < 0.5 or name.endswith((".gz", ".zst"))  # of which a block holds many rows
        assert found[-1] > 0.7  # the last batch counts when it is done
        assert source.meter.share == 1.0


@pytest.mark.parametrize("name", NAMES)
def test_a_limit_is_the_whole(tmp_path: Path, name: str) -> None:
    source = open_source(DataSource(path=written(tmp_path, name), limit=1500), "data.train.0")
    found = shares(source)
    assert len(found) == 1500
    assert found[-1] == source.meter.share == 1.0


def test_several_files_are_one_whole(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        written(tmp_path, name)
    source = open_source(DataSource(path=str(tmp_path / "?.jsonl")), "data.train.0")
    found = shares(source)
    assert found == sorted(found)
    assert found[len(ROWS)] == pytest.approx(0.5, abs=0.05)


def test_lines_in_a_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock = iter([0.0, 4.0, 10.0, 12.0, 25.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    source = open_source(DataSource(path=written(tmp_path, "a.jsonl"), limit=2000), "data.train.0")
    rows = source.rows()
    with progress.telling(source) as tell:
        for number in range(1, 5):
            for _ in range(500):
                next(rows)
            tell(500 * number, 7000 * number)
    assert [record.getMessage() for record in caplog.records] == [
        "data.train.0: 1,000 rows read, 50%, 100 rows/s, 14,000 tokens",
        "data.train.0: 2,000 rows read, 100%, 80 rows/s, 28,000 tokens",
    ]


def test_a_bar_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    caplog.set_level(logging.INFO)
    monkeypatch.setattr(progress, "_BAR_EVERY_S", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    source = open_source(DataSource(path=written(tmp_path, "a.jsonl"), limit=2000), "data.train.0")
    with progress.telling(source) as tell:
        for number, _ in enumerate(source.rows(), start=1):
            if number % 500 == 0:
                tell(number, 14 * number)
    shown = terminal.getvalue()
    assert "data.train.0: 2,000 rows read, 100%" in shown
    assert "rows/s, 28,000 tokens" in shown
    assert not caplog.records


def test_rows_of_an_earlier_process_are_in_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now, said = iter([0.0, 10.0, 20.0]), []
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    tell = progress._every(10.0, 1000, lambda rows, tokens, rate: said.append((rows, rate)))
    tell(1500, 1)
    tell(3000, 1)
    assert said == [(1500, 50.0), (3000, 100.0)]
