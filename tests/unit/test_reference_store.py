"""The folder of stored log-probabilities: what is read is what was written, whatever happened to the files."""

import json
import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from dpo_dist.batch import RankWork
from dpo_dist.distributed import Ranks
from dpo_dist.errors import ConfigError
from dpo_dist.packing import Packer, sizes_of
from dpo_dist.reference import CacheIdentity, numerics_of, open_cache
from dpo_dist.reference import store as store_file
from dpo_dist.reference.keys import DistinctKeys, dataset_keys
from dpo_dist.reference.lookup import MISSING, REPEATED, STORED, TOKENS_MISSING, look_up
from dpo_dist.reference.rows import PartReader, is_sound, make_batch
from dpo_dist.reference.selection import Selection, plans
from dpo_dist.reference.store import ReferenceStore, StoredRows
from dpo_dist.tokenization import TokenizedExample
from tests.stored_rows import KnownScorer, examples_of, save_dataset, value_of

IDENTITY = CacheIdentity("abc", "bfloat16", "1-sdpa", "models/one")
NOBODY = 65534


def rows(numbers: list[int], tokens: bool = False, shift: float = 0.0, seed: int = IDENTITY.seed) -> pa.RecordBatch:
    """Rows whose every value follows from their number."""
    numbers_N = np.array(numbers, dtype=np.int64)
    num_tokens = numbers_N % 3 + 1
    values = np.arange(num_tokens.sum(), dtype=np.float32) - 100 if tokens else None
    return make_batch(keys(numbers), num_tokens, (-1.5 * numbers_N - shift).astype(np.float32), values, seed)


def keys(numbers: list[int]) -> np.ndarray:
    return np.array([[number // 2, 2**63 + number] for number in numbers], dtype=np.uint64).reshape(-1, 2)


def write(folder: Path, *parts: list[pa.RecordBatch]) -> ReferenceStore:
    """A folder of some parts."""
    store = ReferenceStore(folder, IDENTITY)
    for part in parts:
        lock = store.try_lock(0.0)
        assert lock is not None
        writer = store.new_part()
        for batch in part:
            writer.append(batch)
        writer.close()
        lock.release()
    return store


def found(store: ReferenceStore) -> dict[int, float]:
    """Number and value of every row that can be read; the first of equal ones."""
    stored = store.read()
    values: dict[int, float] = {}
    for key, value in zip(stored.keys, stored.logps, strict=True):
        assert key[0] == (key[1] - 2**63) // 2
        values.setdefault(int(key[1] - 2**63), float(value))
    return values


def expected(numbers: range | list[int]) -> dict[int, float]:
    return {number: -1.5 * number for number in numbers}


# ---- what a kill or a disk leaves


def test_a_part_may_end_at_any_byte(tmp_path: Path) -> None:
    store = write(tmp_path / "whole", [rows([1, 2], tokens=True), rows([3]), rows([4, 5, 6], tokens=True)])
    whole = (tmp_path / "whole/rows-000001.arrow").read_bytes()
    assert found(store) == expected(range(1, 7))
    counts = []
    for end in range(len(whole) + 1):
        (tmp_path / "whole/rows-000001.arrow").write_bytes(whole[:end])
        values = found(store)
        assert values == expected(range(1, len(values) + 1))
        counts.append(len(values))
    assert sorted(counts) == counts and set(counts) == {0, 2, 3, 6}  # whole chunks, and never fewer from more bytes


def test_no_flipped_bit_changes_a_value(tmp_path: Path) -> None:
    store = write(tmp_path / "c", [rows([1, 2], tokens=True), rows([3])])
    path = tmp_path / "c/rows-000001.arrow"
    whole, unharmed = path.read_bytes(), 0
    for position in range(len(whole)):
        flipped = whole[position] ^ (1 << position % 8)
        path.write_bytes(whole[:position] + bytes([flipped]) + whole[position + 1 :])
        values = found(store)
        assert values.items() <= expected([1, 2, 3]).items()
        unharmed += values == expected([1, 2, 3])
    # Much of a small file is padding and names; a checksum that never failed would leave more.
    assert 0 < unharmed < len(whole)


@pytest.mark.parametrize("column", ["key", "num_tokens", "logps", "token_logps", "checksum"])
def test_every_column_is_under_the_checksum(tmp_path: Path, column: str) -> None:
    """A value that is another one and a whole file is what only the checksum can tell."""
    good, other = rows([1, 2], tokens=True), rows([8, 9], tokens=True, shift=1.0)
    if column == "token_logps":
        lists = pa.array([[9.0] * len(values) for values in good.column(column).to_pylist()], good.column(column).type)
        other = other.set_column(3, other.schema.field(3), lists)
    index = good.schema.get_field_index(column)
    mixed = good.set_column(index, good.schema.field(index), other.column(column))
    assert not good.equals(mixed)
    assert found(write(tmp_path, [mixed, rows([3])])) == expected([3])


def test_tokens_that_were_never_asked_for_are_none(tmp_path: Path) -> None:
    """Null and empty lists are told apart, so a row cannot lose its tokens unnoticed."""
    with_tokens = rows([1, 2], tokens=True)
    without = with_tokens.set_column(3, with_tokens.schema.field(3), pa.nulls(2, with_tokens.schema.field(3).type))
    assert found(write(tmp_path, [without])) == {}
    assert write(tmp_path, [rows([3]), rows([4], tokens=True)]).read().has_tokens.tolist() == [False, True]


def test_zeros_and_garbage_at_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    store = write(tmp_path, [rows([1, 2])])
    path = tmp_path / "rows-000001.arrow"
    whole = path.read_bytes()
    for tail in (bytes(5), bytes(4096), b"\xff" * 300, os.urandom(1000), whole):
        path.write_bytes(whole + tail)
        assert found(store) == expected([1, 2])
    (tmp_path / "rows-000002.arrow").write_bytes(b"")
    (tmp_path / "rows-000003.arrow").write_bytes(bytes(9000))
    assert found(write(tmp_path, [rows([5])])) == expected([1, 2, 5])
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    rest = "the rest cannot be read, as after a kill, and counts as missing"
    assert caplog.records[0].getMessage() == f"{path}: 2 rows read; {rest}"


def test_damaged_rows_are_counted_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = write(tmp_path, [rows([1, 2]), rows([3, 4])])
    path = tmp_path / "rows-000001.arrow"
    path.write_bytes(path.read_bytes().replace(np.float32([-3.0]).tobytes(), bytes(4)))
    assert found(store) == expected([1, 3, 4])
    assert [record.getMessage() for record in caplog.records] == [f"{path}: 1 rows are damaged and count as missing"]


def test_zeroed_rows_are_no_rows() -> None:
    batch = rows([1, 2, 3])
    lists, zeros = batch.schema.field(3).type, [0] * 3
    columns = [pa.array([bytes(16)] * 3, pa.binary(16)), pa.array(zeros, pa.int32()), pa.array(zeros, pa.float32())]
    zeroed = pa.record_batch([*columns, pa.nulls(3, lists), pa.array(zeros, pa.uint64())], schema=batch.schema)
    assert not is_sound(zeroed, IDENTITY.seed).any() and is_sound(batch, IDENTITY.seed).all()


def test_a_part_of_another_reference_is_not_read(tmp_path: Path) -> None:
    other = CacheIdentity("other", "bfloat16", "1-sdpa")
    assert found(write(tmp_path, [rows([1], seed=other.seed), rows([2])])) == expected([2])


# ---- whose folder it is


@pytest.mark.parametrize(
    ("other", "differing"),
    [
        (
            CacheIdentity("xyz", "bfloat16", "1-sdpa", "models/two"),
            "weights=abc (this run: xyz), made from models/one (this run: models/two)",
        ),
        (
            CacheIdentity("abc", "float32", numerics_of("flash_attention_2")),
            "dtype=bfloat16 (this run: float32), numerics=1-sdpa (this run: 1-flash_attention_2)",
        ),
    ],
)
def test_a_folder_belongs_to_one_reference(tmp_path: Path, other: CacheIdentity, differing: str) -> None:
    write(tmp_path, [rows([1])])
    with pytest.raises(ConfigError) as caught:
        ReferenceStore(tmp_path, other)
    assert str(caught.value) == (
        f"reference.cache_dir={tmp_path} holds log-probabilities of another reference: {differing}; "
        "give another folder, or leave reference.cache_dir out"
    )


def test_folders_that_are_no_cache(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"full holds thesis\.tex and no reference\.json.*give a new or empty folder"):
        ReferenceStore(tmp_path / "full", IDENTITY)
    for path in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(ConfigError, match="is not a folder; give a folder"):
            ReferenceStore(path, IDENTITY)
    ReferenceStore(tmp_path / "missing", IDENTITY)
    assert not (tmp_path / "missing").exists()  # looking writes nothing


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps({"format": 2, "weights": 3}), "has format 2, and this version reads and writes 1; delete"),
        ("", "reference.json is damaged; delete the folder, or give another one"),
        ("[]", "damaged"),
        ("7", "damaged"),
        (json.dumps({"format": 1, "weights": "abc", "dtype": "bfloat16"}), "damaged"),
        (json.dumps({"weights": "abc", "dtype": "bfloat16", "numerics": "1-sdpa"}), "damaged"),
    ],
)
def test_an_identity_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path, [rows([1])])
    (tmp_path / "reference.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        ReferenceStore(tmp_path, IDENTITY)


def test_what_a_kill_before_the_identity_leaves_is_an_empty_folder(tmp_path: Path) -> None:
    for name in (".lock", ".holder", ".reference.json"):
        (tmp_path / name).write_text("")
    assert found(write(tmp_path, [rows([1])])) == expected([1])


# ---- one writer


def test_a_part_is_never_continued(tmp_path: Path) -> None:
    store = write(tmp_path, [rows([1])], [rows([2])])
    before = (tmp_path / "rows-000001.arrow").read_bytes()
    write(tmp_path, [rows([3])])
    assert (tmp_path / "rows-000001.arrow").read_bytes() == before
    assert [name for name, _ in store.state()] == [f"rows-00000{number}.arrow" for number in (1, 2, 3)]
    with pytest.raises(FileExistsError):
        store_file.PartWriter(tmp_path / "rows-000003.arrow")


def test_what_was_appended_is_there_before_the_part_is_closed(tmp_path: Path) -> None:
    store = write(tmp_path, [])
    writer = store.new_part()
    writer.append(rows([1]))
    assert found(store) == expected([1])
    writer.append(rows([2]))
    assert found(store) == expected([1, 2])
    writer.close()


def test_append_returns_when_all_is_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill cannot show it: the system keeps what a dead process has written. A power cut would."""
    store, path, sizes = write(tmp_path, []), tmp_path / "rows-000001.arrow", []

    def noted(descriptor: int) -> None:
        sizes.append([os.readlink(f"/proc/self/fd/{descriptor}"), path.stat().st_size])

    path.unlink()  # of the empty part
    monkeypatch.setattr(os, "fsync", noted)
    writer = store.new_part()
    assert [name for name, _ in sizes] == [str(tmp_path)]  # its name
    for number in (1, 2):
        writer.append(rows([number]))
        assert sizes[-1] == [str(path), path.stat().st_size] and len(sizes) == 1 + number
    writer.close()


def test_the_lock_has_one_holder_who_is_named(tmp_path: Path) -> None:
    first, second = ReferenceStore(tmp_path, IDENTITY), ReferenceStore(tmp_path, IDENTITY)
    lock = first.try_lock(0.0)
    assert lock is not None and second.try_lock(0.0) is None
    assert second.holder().startswith(f"process {os.getpid()} on ")
    lock.release()
    again = second.try_lock(0.0)
    assert again is not None
    again.release()


def test_the_first_sum_of_a_key_counts(tmp_path: Path) -> None:
    write(tmp_path, [rows([1, 2])], [rows([2, 3], tokens=True, shift=0.25)])
    stored = ReferenceStore(tmp_path, IDENTITY).read()
    known = look_up(keys([3, 2, 1, 4, 2]), stored, with_tokens=False)
    assert known.values[:3].tolist() == [-4.75, -3.0, -1.5] and np.isnan(known.values[3])
    assert known.status.tolist() == [STORED, STORED, STORED, MISSING, STORED]
    fuller = look_up(keys([3, 2, 1, 4, 2, 1]), stored, with_tokens=True)
    assert fuller.status.tolist() == [STORED, STORED, TOKENS_MISSING, MISSING, STORED, STORED]
    assert fuller.values[[1, 2, 5]].tolist() == [-3.0, -1.5, -1.5] and fuller.num_distinct == 4


# ---- many parts are made one


@pytest.fixture
def few_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_file, "MAX_PARTS", 3)
    monkeypatch.setattr(store_file, "_ROWS_PER_BATCH", 4)


MANY = [[rows([1, 2]), rows([3])], [rows([2, 4], tokens=True, shift=0.5)], [rows([5])], [rows([5, 6], shift=0.5)], []]


def test_many_parts_become_one(tmp_path: Path, few_parts: None) -> None:
    store = write(tmp_path, *MANY)
    (tmp_path / "rows-000003.arrow").write_bytes((tmp_path / "rows-000003.arrow").read_bytes()[:-3])
    before, lookup_before = found(store), look_up(keys([1, 2, 3, 4, 5, 6]), store.read(), with_tokens=True)
    assert before[2] == -3.0 and before[4] == -6.5
    store.compact()
    assert [name for name, _ in store.state()] == ["rows-000006.arrow"]
    assert found(store) == before and len(store.read().keys) == 7  # two rows of key 2: its sum, and its tokens
    lookup = look_up(keys([1, 2, 3, 4, 5, 6]), store.read(), with_tokens=True)
    assert lookup.status.tolist() == lookup_before.status.tolist()
    reader = PartReader(tmp_path / "rows-000006.arrow", IDENTITY.seed)
    assert [batch.num_rows for batch in reader.batches()] == [5, 2] and not reader.num_damaged and not reader.is_cut
    write(tmp_path, [rows([9])])
    assert found(store) == before | expected([9])


def test_few_parts_stay(tmp_path: Path, few_parts: None) -> None:
    store = write(tmp_path, *MANY[:3])
    before = store.state()
    store.compact()
    assert store.state() == before


def test_a_kill_while_parts_are_made_one_loses_nothing(
    tmp_path: Path, few_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before and after every single change of the folder."""

    class Killed(BaseException):
        pass

    for stop_at in range(20):
        store = write(tmp_path / str(stop_at), *MANY)
        before, calls = found(store), 0

        def counted(function, stop_at=stop_at):
            def wrapper(*arguments, **named):
                nonlocal calls
                calls += 1
                if calls > stop_at:
                    raise Killed
                return function(*arguments, **named)

            return wrapper

        with monkeypatch.context() as patched:
            patched.setattr(store_file.os, "replace", counted(os.replace))
            patched.setattr(store_file, "sync", counted(store_file.sync))
            patched.setattr(Path, "unlink", counted(Path.unlink))
            try:
                store.compact()
            except Killed:
                assert found(store) == before
            else:
                break
        assert found(store) == before
    assert stop_at == 8  # staging, rename, folder, five parts
    store.compact()
    assert found(store) == before


def test_a_part_that_goes_while_it_is_read_is_read_in_its_new_place(
    tmp_path: Path, few_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, listed = write(tmp_path, *MANY), ReferenceStore._parts
    before, once = found(store), [True]

    def stale(self: ReferenceStore) -> list[Path]:
        paths = listed(self)
        if once.pop() if once else False:
            store.compact()
        return paths

    monkeypatch.setattr(ReferenceStore, "_parts", stale)
    assert found(ReferenceStore(tmp_path, IDENTITY)) == before


# ---- folders that take nothing


@contextmanager
def as_nobody() -> Iterator[None]:
    """Without root's right to write everywhere."""
    if os.geteuid():
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def closed() -> Iterator[Path]:
    """A folder for `close`; pytest's own ones are closed to others."""
    folder = Path(tempfile.mkdtemp(prefix="read-only-", dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    for path in (path for path in folder.rglob("*") if path.is_dir()):
        path.chmod(0o755)
    shutil.rmtree(folder)


def close(folder: Path) -> None:
    """Let everybody read all below, and nobody but root write."""
    for path in folder.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)


def test_a_read_only_folder_is_read_and_says_why_it_takes_nothing(closed: Path) -> None:
    write(closed / "cache", [rows([1])])
    close(closed)
    with as_nobody():
        store = ReferenceStore(closed / "cache", IDENTITY)
        assert found(store) == expected([1])
        assert store.why_not_writable() == f"{closed}/cache is read-only for this process"
        with pytest.raises(ConfigError, match=r"reference\.cache_dir=.*lacks rows and cannot be written.*denied"):
            store.try_lock(0.0)
    assert ReferenceStore(closed / "new/deep", IDENTITY).why_not_writable() == ""


def test_a_complete_cache_needs_no_writing(closed: Path) -> None:
    first, new = examples_of(6, seed=1), examples_of(3, seed=2)
    datasets = [save_dataset(closed / "first", first), save_dataset(closed / "new", new)]
    ranks, packer = Ranks(0, 1, 0, torch.device("cpu")), Packer(1, 64, 64, True)
    open_cache(closed / "cache", IDENTITY, datasets[:1], ranks, False).fill(KnownScorer(), packer)
    for name in (".lock", ".holder"):
        (closed / "cache" / name).unlink(missing_ok=True)
    close(closed)
    before = sorted((closed / "cache").iterdir())
    with as_nobody():
        cache = open_cache(closed / "cache", IDENTITY, datasets[:1], ranks, False)
        cache.require_writable()
        cache.fill(KnownScorer(), packer)
        cache.verify(KnownScorer(), packer, 4, 1e-5)
        work = RankWork(packer.plan(0, [2], sizes_of(datasets[0], [2])), 0, datasets[0], True)
        expected_C = [value_of(first[2].prompt_ids, ids) for ids in first[2].completion_ids]
        assert cache.reference().completion_logps(work).tolist() == expected_C
        incomplete = open_cache(closed / "cache", IDENTITY, datasets, ranks, False)
        for attempt in (incomplete.require_writable, lambda: incomplete.fill(KnownScorer(), packer)):
            with pytest.raises(ConfigError, match=r"^reference\.cache_dir=.*/cache lacks rows and cannot be written"):
                attempt()
    assert sorted((closed / "cache").iterdir()) == before


def test_only_examples_that_are_asked_for_are_computed(tmp_path: Path) -> None:
    first, second = examples_of(6, seed=1), examples_of(3, seed=2)
    datasets = [
        save_dataset(tmp_path / name, rows) for name, rows in (("first", [*first, first[0]]), ("second", second))
    ]
    ranks, packer = Ranks(0, 1, 0, torch.device("cpu")), Packer(1, 64, 64, True)
    scorer = KnownScorer()
    # The last example repeats the first one, which is not asked for itself.
    cache = open_cache(tmp_path / "cache", IDENTITY, datasets, ranks, False, [np.array([6, 4]), None])
    asked = [first[0], first[4], *second]
    assert cache.num_missing == len({(e.prompt_ids, ids) for e in asked for ids in e.completion_ids})
    cache.fill(scorer, packer)
    assert {prompt for prompt, _ in scorer.seen} == {example.prompt_ids for example in asked}
    reference = cache.reference()

    def answer(row: int) -> list[float]:
        plan = packer.plan(0, [row], sizes_of(datasets[0], [row]))
        return reference.completion_logps(RankWork(plan, 0, datasets[0], True)).tolist()

    assert answer(6) == [value_of(first[0].prompt_ids, ids) for ids in first[0].completion_ids]
    assert answer(4) == [value_of(first[4].prompt_ids, ids) for ids in first[4].completion_ids]
    with pytest.raises(RuntimeError, match="was not looked up"):
        answer(2)
    again = open_cache(tmp_path / "cache", IDENTITY, datasets, ranks, False)
    assert 0 < again.num_missing < again.num_found + again.num_missing


def test_a_full_disk_keeps_what_was_written(tmp_path: Path) -> None:
    store = write(tmp_path, [])
    writer = store.new_part()
    writer.append(rows([1, 2]))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "rows-000001.arrow").stat().st_size + 100, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            writer.append(rows(list(range(3, 50))))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    writer.close()
    assert found(store) == expected([1, 2])
    assert str(store.refused("No space left on device")) == (
        f"reference.cache_dir={tmp_path} lacks rows and cannot be written (No space left on device); what was written "
        "before is kept; make it writable, free some space, or give another folder"
    )


# ---- keys


def test_keys_are_of_the_ids_of_prompt_and_completion(tmp_path: Path) -> None:
    examples = [
        TokenizedExample((1, 2), ((3, 4), (3,)), (), "a:1"),
        TokenizedExample((1,), ((2, 3, 4), (3,)), (), "a:2"),  # the same ids in another split
        TokenizedExample((1, 2), ((3, 4),), (), "a:3"),
    ]
    first = dataset_keys([save_dataset(tmp_path / "a", examples)])
    assert len(DistinctKeys(first)) == 4 and (first[0] == first[4]).all()
    # Known for good: stored rows are found by these bytes on every machine, in every version.
    assert first[0].tobytes().hex() == KNOWN_KEY
    many = examples_of(2500, seed=1)  # more than one batch of the file
    both = dataset_keys([save_dataset(tmp_path / "b", many), save_dataset(tmp_path / "c", examples)])
    lone = dataset_keys([save_dataset(tmp_path / "d", many[2000:])])
    assert (both[-5:] == first).all() and (both[-5 - len(lone) : -5] == lone).all()


KNOWN_KEY = "cfbcb96ff34c351e1ddd3907a58dae0b"  # xxh3_128 of struct.pack("<qqiiii", 2, 2, 1, 2, 3, 4)


def test_sorted_keys_are_found_among_halves_that_are_equal() -> None:
    generator = np.random.default_rng(0)
    given = generator.integers(0, 6, (300, 2)).astype(np.uint64)
    distinct = DistinctKeys(given)
    as_tuples = [tuple(key) for key in given.tolist()]
    assert [tuple(key) for key in distinct.keys.tolist()] == sorted(set(as_tuples))
    assert [tuple(key) for key in distinct.keys[distinct.group].tolist()] == as_tuples
    assert distinct.first.tolist() == [as_tuples.index(tuple(key)) for key in distinct.keys.tolist()]
    some = DistinctKeys(given[:20])
    asked = np.array([[high, low] for high in range(8) for low in range(8)], dtype=np.uint64)
    places = [tuple(key) for key in some.keys.tolist()]
    assert some.find(asked).tolist() == [
        places.index(tuple(key)) if tuple(key) in places else -1 for key in asked.tolist()
    ]
    assert DistinctKeys(given[:0]).find(asked[:3]).tolist() == [-1, -1, -1]


def test_a_repeated_completion_is_computed_once() -> None:
    nothing = StoredRows(keys([]), np.empty(0, np.float32), np.empty(0, bool))
    lookup = look_up(keys([5, 3, 5, 5, 3, 1]), nothing, with_tokens=False)
    assert lookup.status.tolist() == [MISSING, MISSING, REPEATED, REPEATED, REPEATED, MISSING]
    assert lookup.sources.tolist() == [0, 0, 1] and lookup.num_distinct == 3 and np.isnan(lookup.values).all()


# ---- what is missing, as examples


@pytest.mark.parametrize("world_size", [1, 2, 5])
@pytest.mark.parametrize("share", [True, False])
def test_selected_completions_are_planned_once_and_in_one_bin_of_each_rank(
    tmp_path: Path, world_size: int, share: bool
) -> None:
    contents = [examples_of(40, seed=1), examples_of(30, seed=2)]
    datasets = [save_dataset(tmp_path / str(i), examples) for i, examples in enumerate(contents)]
    flat = [
        (one.prompt_ids, ids, one.source) for examples in contents for one in examples for ids in one.completion_ids
    ]
    places = np.flatnonzero(np.random.default_rng(0).random(len(flat)) < 0.6)
    selection, packer = Selection(datasets, places), Packer(world_size, 16, 60, share)
    chosen = [(example.prompt_ids, ids, example.source) for example in selection for ids in example.completion_ids]
    assert chosen == [flat[place] for place in places]
    assert [selection.source(i) for i in range(len(places))] == [flat[place][2] for place in places]
    all_plans = list(plans(selection, packer))
    assert [index for plan in all_plans for index in plan.examples] == list(range(len(selection)))
    for plan in all_plans:
        assert {len(bins) for bins in plan.reference_bins} == {1} and plan.num_pairs == 0
        sizes = [selection.size(index) for index in plan.examples]
        assert all(sum(sizes[i].input_tokens(share) for i in bins[0]) <= 60 for bins in plan.reference_bins)
        for size, index in zip(sizes, plan.examples, strict=True):
            assert (size.prompt, size.completions) == (
                len(selection[index].prompt_ids),
                tuple(len(ids) for ids in selection[index].completion_ids),
            )
    # Not far from full: the next example would not have fitted, or would have made two bins of one.
    used = sum(selection.size(i).input_tokens(share) for plan in all_plans[:-1] for i in plan.examples)
    assert used > 0.6 * 60 * world_size * len(all_plans[:-1])


def test_an_example_that_is_larger_than_the_bins_is_computed_alone(tmp_path: Path) -> None:
    dataset = save_dataset(tmp_path / "data", examples_of(5, seed=1))
    selection = Selection([dataset], np.arange(len(dataset.completion_lengths.flat)))
    assert [plan.examples for plan in plans(selection, Packer(2, 1, 1, True))] == [(0,), (1,), (2,), (3,), (4,)]
    assert len(Selection([dataset], np.arange(0))) == 0
