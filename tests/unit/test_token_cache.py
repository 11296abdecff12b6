"""The cache of token ids, damaged in every way: never another number, never a signal; data files that change."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.config import DataConfig, DataSource
from dpo_dist.errors import DataError
from dpo_dist.tokenization import TokenizedDataset, TokenizerSpec, prepare_dataset, writing

ROWS = [
    {"prompt_ids": [n, 1, 2], "chosen_ids": [2, 3, n], "rejected_ids": [4] * (1 + n % 5), "weight": 1 + n / 8}
    for n in range(40)
]


@pytest.fixture
def source(tmp_path: Path) -> DataSource:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return DataSource(path=str(path))


@pytest.fixture
def read(tmp_path: Path, source: DataSource) -> Callable[[], TokenizedDataset]:
    def tokenised() -> TokenizedDataset:
        spec = TokenizerSpec(str(tmp_path / "none"))
        return prepare_dataset([source], DataConfig(train=[source]), spec, tmp_path / "cache")

    return tokenised


def content(dataset: TokenizedDataset) -> list[Any]:
    return [*(dataset[index] for index in range(len(dataset))), dataset.fingerprint, dataset.stats()]


def damages(size: int) -> dict[str, Callable[[bytes], bytes]]:
    """Every kind of damage, by name."""
    draw = random.Random(0)
    found: dict[str, Callable[[bytes], bytes]] = {
        "empty": lambda whole: b"",
        "cut in the middle": lambda whole: whole[: len(whole) // 2],
        "one byte short": lambda whole: whole[:-1],
        "one byte more": lambda whole: whole + b"\0",
        "zeros": lambda whole: bytes(len(whole)),
    }
    for number in range(20):
        place, bit = draw.randrange(size), draw.randrange(8)
        found[f"flip {number} at byte {place}"] = lambda whole, place=place, bit=bit: (
            whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :]
        )
    return found


@pytest.mark.parametrize("name", ["examples.arrow", "summary.json"])
def test_whatever_is_damaged_is_written_again(read: Callable[[], TokenizedDataset], tmp_path: Path, name: str) -> None:
    expected = content(read())
    (path,) = (tmp_path / "cache").glob(f"*/{name}")
    whole = path.read_bytes()
    for damage, change in damages(len(whole)).items():
        path.write_bytes(change(whole))
        assert path.read_bytes() != whole, damage
        assert content(read()) == expected, damage
    assert path.read_bytes() == whole


def test_a_damaged_cache_is_named_when_it_is_written_again(
    read: Callable[[], TokenizedDataset], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    read()
    (path,) = (tmp_path / "cache").glob("*/examples.arrow")
    path.write_bytes(path.read_bytes()[:-1])
    read()
    assert f"{path.parent} is damaged and is written again" in caplog.text


def test_a_data_file_that_grows_while_it_is_read(
    read: Callable[[], TokenizedDataset], source: DataSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows must not be kept under the name of the shorter file."""
    path, write = Path(source.path), writing._write_source

    def growing(*arguments: Any) -> int:
        count = write(*arguments)
        path.write_text(path.read_text() + json.dumps(ROWS[0]) + "\n")
        return count

    monkeypatch.setattr(writing, "_write_source", growing)
    with pytest.raises(DataError, match=r"data\.train\.0\.path=.*pairs\.jsonl changed while it was read; wait until"):
        read()
    monkeypatch.undo()
    assert len(read()) == len(ROWS) + 1
    assert len(list((tmp_path / "cache").glob("*/examples.arrow"))) == 1
