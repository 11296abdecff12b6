"""URLs as data: read as local files are, from a copy that is of what is there now."""

import gzip
import json
import logging
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from datasets import Dataset

from dpo_dist.config import DataConfig, DataSource, is_url, load_config, shown_url, without_secrets
from dpo_dist.config.files import find_input
from dpo_dist.data import PreferenceExample, RowFault, Source, open_source, remote, stores
from dpo_dist.errors import DataError
from tests.web_server import WebServer, serving

ROWS = [{"prompt": f"Say {n}.", "chosen": f" {n}", "rejected": " no"} for n in range(20)]
TEXT = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
KEY = "data.train.0"


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_PAUSES_S", (0.0, 0.0, 0.0))


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    yield files
    files.store.clear()


@pytest.fixture
def web(tmp_path: Path) -> Iterator[WebServer]:
    folder = tmp_path / "served"
    folder.mkdir()
    with serving(folder) as server:
        yield server


def opened(url: str, tmp_path: Path, **settings: Any) -> Source:
    return open_source(DataSource(path=url, **settings), KEY, cache_dir=tmp_path / "cache")


def read(url: str, tmp_path: Path, **settings: Any) -> list[PreferenceExample | RowFault]:
    return list(opened(url, tmp_path, **settings).examples())


def prompts(url: str, tmp_path: Path, **settings: Any) -> list[Any]:
    return [one.prompt for one in read(url, tmp_path, **settings) if isinstance(one, PreferenceExample)]


def copies(tmp_path: Path) -> list[Path]:
    return sorted(path for path in (tmp_path / "cache" / "copies").rglob("*") if path.suffix not in ("", ".lock"))


EXPECTED = [row["prompt"] for row in ROWS]


# ---- what a URL names


def test_a_file(memory: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    memory.pipe("/b/pairs.jsonl", TEXT + b"{}\n")
    found = read("memory://b/pairs.jsonl", tmp_path)
    assert [one.prompt for one in found[:-1] if isinstance(one, PreferenceExample)] == EXPECTED
    assert found[-1].source == "memory://b/pairs.jsonl:21"


@pytest.mark.parametrize("name", ["pairs.jsonl.gz", "PAIRS.JSONL.GZ", "pairs.parquet", "pairs.csv"])
def test_formats(memory: fsspec.AbstractFileSystem, tmp_path: Path, name: str) -> None:
    local = tmp_path / name.lower()
    if name.lower().endswith(".gz"):
        local.write_bytes(gzip.compress(TEXT))
    elif name.endswith(".csv"):
        Dataset.from_list(ROWS).to_csv(local, index=False)
    else:
        Dataset.from_list(ROWS).to_parquet(local)
    memory.pipe(f"/b/{name}", local.read_bytes())
    assert prompts(f"memory://b/{name}", tmp_path) == EXPECTED


def test_a_pattern_is_read_by_name(memory: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    for number in (1, 0):
        memory.pipe(f"/b/pairs-{number}.jsonl", b"".join(TEXT.splitlines(True)[10 * number : 10 * number + 10]))
    memory.pipe("/b/other.jsonl", b"{}\n")
    assert prompts("memory://b/pairs-*.jsonl", tmp_path) == EXPECTED
    assert prompts("memory://b/pairs-?.jsonl", tmp_path) == EXPECTED
    with pytest.raises(DataError, match=r"data\.train\.0\.path=memory://b/x-\?\.jsonl matches no file"):
        read("memory://b/x-?.jsonl", tmp_path)


@pytest.mark.parametrize("inside", ["", "data/"])
def test_a_folder_of_splits(memory: fsspec.AbstractFileSystem, tmp_path: Path, inside: str) -> None:
    memory.pipe(f"/b/{inside}train-00000-of-00002.jsonl", TEXT)
    memory.pipe(f"/b/{inside}test.jsonl", b"".join(TEXT.splitlines(True)[:3]))
    with pytest.raises(DataError, match="does not hold every shard of split train"):
        read("memory://b", tmp_path)
    memory.pipe(f"/b/{inside}train-00001-of-00002.jsonl", TEXT)
    assert prompts("memory://b/", tmp_path) == EXPECTED * 2
    assert prompts("memory://b", tmp_path, split="test") == EXPECTED[:3]
    with pytest.raises(DataError, match=r"split=dev is not in the folder memory://b, which holds test\.jsonl"):
        read("memory://b", tmp_path, split="dev")


def test_a_saved_data_set_is_refused(memory: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    memory.pipe("/b/state.json", b"{}")
    with pytest.raises(DataError, match=r"save_to_disk.*memory://b/data-\*\.arrow"):
        read("memory://b", tmp_path)


@pytest.mark.parametrize(
    ("url", "settings", "error"),
    [
        ("memory://b/none.jsonl", {}, "path=memory://b/none.jsonl is not there .*correct the path"),
        ("memory://b/notes.txt", {}, "path=memory://b/notes.txt is not a file of a known type"),
        ("memory://b/pairs.jsonl", {"split": "test"}, "split=test has no effect on the single file"),
        ("memory://b/pairs.jsonl", {"revision": "main"}, "revision=main belongs to a hub id, .* is a URL"),
        ("nosuch://b/pairs.jsonl", {}, "nosuch:// is no protocol that is known here"),
        ("https://h/pairs-*.jsonl", {}, "a web server lists neither folders nor patterns"),
        ("https://h/folder?a=b", {}, r"path=https://h/folder\?\*\*\* is no file of a known type"),
    ],
)
def test_what_is_refused(
    memory: fsspec.AbstractFileSystem, tmp_path: Path, url: str, settings: dict[str, Any], error: str
) -> None:
    memory.pipe("/b/pairs.jsonl", TEXT)
    memory.pipe("/b/notes.txt", TEXT)
    with pytest.raises(DataError, match=error):
        read(url, tmp_path, **settings)


@pytest.mark.parametrize(("protocol", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("abfs", "adlfs")])
def test_a_missing_package_is_named(
    protocol: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(url: str) -> Any:
        raise ImportError(f"Install {package}")

    monkeypatch.setattr(stores, "url_to_fs", missing)
    with pytest.raises(DataError, match=rf"{protocol}:// needs the package {package}; run `pip install {package} "):
        read(f"{protocol}://b/pairs.jsonl", tmp_path)


# ---- copies


def test_a_copy_is_made_once(memory: fsspec.AbstractFileSystem, tmp_path: Path, monkeypatch: Any) -> None:
    memory.pipe("/b/pairs.jsonl", TEXT)
    first = opened("memory://b/pairs.jsonl", tmp_path)
    monkeypatch.setattr(stores.StoredFile, "open", lambda file: pytest.fail("it is copied again"))
    again = opened("memory://b/pairs.jsonl", tmp_path)
    assert again.identity() == first.identity()
    assert len(copies(tmp_path)) == 1
    assert not list((tmp_path / "cache").rglob(".partial*"))


def test_other_content_is_another_copy(memory: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    memory.pipe("/b/pairs.jsonl", TEXT)
    first = opened("memory://b/pairs.jsonl", tmp_path)
    memory.pipe("/b/pairs.jsonl", TEXT.replace(b"Say 1.", b"Say 9."))
    second = opened("memory://b/pairs.jsonl", tmp_path)
    assert first.identity() != second.identity()
    assert [one.prompt for one in first.examples() if isinstance(one, PreferenceExample)] == EXPECTED


def test_the_identity_is_that_of_the_content(memory: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    memory.pipe("/b/pairs.jsonl", TEXT)
    first = opened("memory://b/pairs.jsonl", tmp_path)
    memory.pipe("/b/pairs.jsonl", TEXT)  # at another time
    assert opened("memory://b/pairs.jsonl", tmp_path).identity() == first.identity()


def test_a_damaged_copy_is_made_again(memory: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    memory.pipe("/b/pairs.jsonl", TEXT)
    read("memory://b/pairs.jsonl", tmp_path)
    (copy,) = copies(tmp_path)
    copy.write_bytes(TEXT.replace(b"Say 1.", b"Say 9."))
    assert prompts("memory://b/pairs.jsonl", tmp_path) == EXPECTED
    assert copies(tmp_path) == [copy]
    assert copy.read_bytes() == TEXT


def test_what_a_killed_process_left_is_no_copy(memory: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    memory.pipe("/b/pairs.jsonl", TEXT)
    read("memory://b/pairs.jsonl", tmp_path)
    (copy,) = copies(tmp_path)
    copy.rename(copy.parent / ".partial-x")
    assert prompts("memory://b/pairs.jsonl", tmp_path) == EXPECTED
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_a_change_while_it_is_copied(memory: fsspec.AbstractFileSystem, tmp_path: Path, monkeypatch: Any) -> None:
    memory.pipe("/b/pairs.jsonl", TEXT)
    opens = stores.StoredFile.open

    def changing(file: stores.StoredFile) -> Any:
        memory.pipe("/b/pairs.jsonl", TEXT + TEXT)
        return opens(file)

    monkeypatch.setattr(stores.StoredFile, "open", changing)
    with pytest.raises(DataError, match=r"path=memory://b/pairs\.jsonl changed while it was copied"):
        read("memory://b/pairs.jsonl", tmp_path)
    assert not copies(tmp_path)


def test_a_full_disk(memory: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    memory.pipe("/b/pairs.jsonl", TEXT)
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(DataError, match=r"its copy in .* cannot be written or read .*make room"):
        read("memory://b/pairs.jsonl", tmp_path)


# ---- web servers


def test_a_file_of_a_web_server(web: WebServer, tmp_path: Path) -> None:
    web.put("pairs one.jsonl.gz", gzip.compress(TEXT + b"{\n"))
    found = read(f"{web.url}/pairs%20one.jsonl.gz", tmp_path)
    assert len(found) == 21
    assert found[-1].source == f"{web.url}/pairs%20one.jsonl.gz:21"
    assert web.requests == 3  # what it is; the content; whether it is still that
    read(f"{web.url}/pairs%20one.jsonl.gz", tmp_path)
    assert web.requests == 4
    web.put("pairs one.jsonl.gz", gzip.compress(TEXT))
    assert len(read(f"{web.url}/pairs%20one.jsonl.gz", tmp_path)) == 20


@pytest.mark.parametrize(
    ("status", "tried", "error"),
    [
        (404, 1, r"is not there \(FileNotFoundError: HTTP 404 .*correct the path"),
        (403, 1, r"may not be read \(PermissionError: HTTP 403 .*give this process access"),
        (400, 1, r"cannot be read \(ValueError: HTTP 400"),
        (503, 4, r"cannot be read \(ConnectionError: HTTP 503 .*check address, network and credentials"),
    ],
)
def test_a_refusal(web: WebServer, tmp_path: Path, status: int, tried: int, error: str) -> None:
    web.put("pairs.jsonl", TEXT)
    web.answers = [status] * 9
    with pytest.raises(DataError, match=error):
        read(f"{web.url}/pairs.jsonl", tmp_path)
    assert web.requests == tried


def test_a_network_that_comes_back(web: WebServer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    web.put("pairs.jsonl", TEXT)
    web.answers = [503, 200, 429, "cut", 200, 200, 503, 200]
    with caplog.at_level(logging.INFO):
        assert prompts(f"{web.url}/pairs.jsonl?token=abc", tmp_path) == EXPECTED
    assert caplog.text.count("it is tried again") == 4
    assert "abc" not in caplog.text
    assert f"{len(TEXT) // 2} of {len(TEXT):,} bytes came".replace(",", "") in caplog.text.replace(",", "")


def test_nobody_answers(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be read \(ConnectionError: .*refused"):
        read("http://127.0.0.1:9/pairs.jsonl", tmp_path)


def test_a_server_that_does_not_tell_versions(web: WebServer, tmp_path: Path) -> None:
    web.put("pairs.jsonl", TEXT)
    web.tells_versions = False
    with pytest.raises(DataError, match="neither ETag nor time of change"):
        read(f"{web.url}/pairs.jsonl", tmp_path)


def test_user_and_password(web: WebServer, tmp_path: Path) -> None:
    web.put("pairs.jsonl", TEXT)
    web.login = "me:se/cret"
    address = web.url.removeprefix("http://")
    assert prompts(f"http://me:se%2Fcret@{address}/pairs.jsonl", tmp_path) == EXPECTED
    with pytest.raises(DataError, match=rf"path=http://\*\*\*@{address}/pairs.jsonl may not be read") as caught:
        read(f"http://me:wrong@{address}/pairs.jsonl", tmp_path)
    assert "wrong" not in str(caught.value)


# ---- names


def test_secrets_are_part_of_no_name(web: WebServer, tmp_path: Path) -> None:
    web.put("pairs.jsonl", TEXT)
    source = opened(f"{web.url}/pairs.jsonl?X-Amz-Signature=abc&code=def", tmp_path)
    first = next(source.examples())
    assert first.source == f"{web.url}/pairs.jsonl?***:1"
    assert not any("abc" in part or "def" in part for part in (source.name, first.source, source.files[0][1]))
    data = DataConfig(
        train=[DataSource(path="a.jsonl")],
        evaluation=[
            DataSource(path="https://u:p@h/one/pairs.jsonl?sig=abc"),
            DataSource(path="s3://bucket/two/pairs-?.jsonl"),
        ],
    )
    assert data.evaluation_names == ("pairs", "pairs-?")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://u:p@h/a.jsonl?x", "https://***@h/a.jsonl?***"),
        ("(http://h/a?b=c&d=e) and 'https://h/b?c'", "(http://h/a?***) and 'https://h/b?***'"),
        ("https://h/a.jsonl?***:3: broken", "https://h/a.jsonl?***:3: broken"),
        ("s3://bucket/pairs-?.jsonl", "s3://bucket/pairs-?.jsonl"),
        ("s3://bucket/pairs.jsonl?versionId=abc", "s3://bucket/pairs.jsonl?***"),
        ("s3://bucket/me@home.jsonl: why?", "s3://bucket/me@home.jsonl: why?"),
    ],
)
def test_secrets_are_hidden(text: str, shown: str) -> None:
    assert without_secrets(text) == shown
    assert without_secrets(shown) == shown


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://u:p@q@h/it's (1).jsonl?code=a'b)c d", "https://***@h/it's (1).jsonl?***"),
        ("https://u:p/q@h/a.jsonl", "https://***@h/a.jsonl"),
        ("s3://key:se/cret@bucket/a.jsonl", "s3://***@bucket/a.jsonl"),
        ("https://h:8000/a@b.jsonl?***", "https://h:8000/a@b.jsonl?***"),
        ("hf://datasets/owner/name@main/a.jsonl", "hf://datasets/owner/name@main/a.jsonl"),
        ("s3://bucket/pairs-?.jsonl", "s3://bucket/pairs-?.jsonl"),
        ("s3://bucket/it's.jsonl?versionId=a'b", "s3://bucket/it's.jsonl?***"),
    ],
)
def test_secrets_of_an_address_are_hidden_whatever_stands_beside_them(url: str, shown: str) -> None:
    assert shown_url(url) == DataSource(path=url).shown == shown
    assert shown_url(shown) == shown


@pytest.mark.parametrize("query", ["code=abc'd", "code=abc)d"])
def test_quotes_in_a_query(web: WebServer, tmp_path: Path, query: str) -> None:
    web.put("it's (1).jsonl", TEXT)
    source = opened(f"{web.url}/it's (1).jsonl?{query}", tmp_path)
    assert source.files[0][1] == f"{web.url}/it's (1).jsonl?***"
    assert len(list(source.examples())) == len(ROWS)


@pytest.mark.parametrize("query", ["code=abc d", "code=abcö", "code=abc\x01"])
def test_a_query_that_is_none_is_not_quoted(web: WebServer, tmp_path: Path, query: str) -> None:
    web.put("pairs.jsonl", TEXT)
    with pytest.raises(DataError, match="write such a character as %20") as caught:
        read(f"{web.url}/pairs.jsonl?{query}", tmp_path)
    assert "abc" not in str(caught.value)


def test_a_url_is_not_looked_up_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s3:" / "bucket").mkdir(parents=True)
    (tmp_path / "s3:" / "bucket" / "pairs.jsonl").write_bytes(TEXT)
    assert find_input("s3://bucket/pairs.jsonl", tmp_path) == "s3://bucket/pairs.jsonl"
    assert is_url("s3://bucket") and not is_url("/a//b") and not is_url("owner/name")
    (tmp_path / "run.yaml").write_text(
        "model: {model_name_or_path: demo}\ndata: {train: [{path: 's3://bucket/pairs.jsonl'}]}\n"
        "train: {output_dir: out}\nparallel: {deepspeed: zero0_cpu}\n"
    )
    assert load_config("run.yaml").data.train[0].path == "s3://bucket/pairs.jsonl"


# ---- together


def _open(url: str, cache: str) -> list[str]:
    return open_source(DataSource(path=url), KEY, cache_dir=Path(cache)).identity()


def test_many_processes_copy_once(web: WebServer, tmp_path: Path) -> None:
    web.put("pairs.jsonl", TEXT * 2000)
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        found = pool.starmap(_open, [(f"{web.url}/pairs.jsonl", str(tmp_path / "cache"))] * 3)
    assert found[0] == found[1] == found[2]
    assert len(copies(tmp_path)) == 1
