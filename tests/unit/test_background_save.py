"""A checkpoint that is written while training goes on: the same content, the same promises."""

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from dpo_dist.checkpoint import CheckpointStore, verify
from dpo_dist.checkpoint.parts import Part, Writing, on_host
from dpo_dist.distributed import Ranks
from dpo_dist.errors import StorageError
from dpo_dist.metrics import Window
from dpo_dist.phases import arm
from tests.run_states import run_state

ALONE = Ranks(0, 1, 0, torch.device("cpu"))
CPU = torch.device("cpu")


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    arm("", 0)
    return CheckpointStore(tmp_path, ALONE, save_total_limit=2)


class Slow:
    """Writes when it is allowed to."""

    def __init__(self) -> None:
        self.may_go_on = threading.Event()

    def __call__(self, folder: Path) -> Sequence[Part]:
        def write() -> None:
            assert self.may_go_on.wait(30)
            (folder / "shards").mkdir()
            torch.save({"step": 3}, folder / "shards/optim_states.pt")

        return [Part(folder / "shards", write)]


def written(store: CheckpointStore) -> bool:
    return bool(store.as_tensor(CPU).item())


def wait_until_written(store: CheckpointStore) -> None:
    for _ in range(300):
        if written(store):
            return
        threading.Event().wait(0.05)
    pytest.fail("it was never written")


def test_it_gets_its_name_when_it_is_finished(store: CheckpointStore) -> None:
    slow, said = Slow(), []
    assert not written(store) and store.finish() is None
    before = store.save(run_state(1), slow, lambda f: (f / "a.txt").write_text("x"), lambda: said.append(1), True)
    assert before is None and said == [1] and not written(store)
    assert {path.name for path in store.folder.iterdir()} == {".tmp-step-000001"}
    slow.may_go_on.set()
    wait_until_written(store)
    assert not (store.folder / "step-000001").exists(), "all ranks have to agree"
    final = store.finish()
    assert final is not None and final.name == "step-000001" and not written(store)
    verify(final)
    assert {path.name for path in store.folder.iterdir()} == {"step-000001", "latest"}
    assert store.find("auto") == final and store.load_state(final) == run_state(1)


def test_finishing_waits(store: CheckpointStore) -> None:
    slow = Slow()
    store.save(run_state(1), slow, in_background=True)
    threading.Timer(0.3, slow.may_go_on.set).start()
    final = store.finish()
    assert final is not None
    verify(final)


def test_what_a_write_raises_is_raised_when_it_is_finished(store: CheckpointStore) -> None:
    slow = Slow()
    slow.may_go_on.set()
    store.save(run_state(1), slow)
    arm("full@0:*:save.written", 0)
    store.save(run_state(2), slow, in_background=True)
    wait_until_written(store)
    with pytest.raises(StorageError, match="disk full"):
        store.finish()
    assert {path.name for path in store.folder.iterdir()} == {"step-000001", "latest"}
    arm("", 0)
    assert store.save(run_state(3), slow) is not None, "and the next one is tried"


def test_what_is_left_by_a_kill_is_no_checkpoint(store: CheckpointStore) -> None:
    slow = Slow()
    slow.may_go_on.set()
    store.save(run_state(1), slow)
    store.save(run_state(2), slow, in_background=True)
    wait_until_written(store)
    again = CheckpointStore(store.folder.parent, ALONE)
    found = again.find("auto")
    assert found is not None and found.name == "step-000001"
    assert {path.name for path in store.folder.iterdir()} == {"step-000001", "latest"}


def test_one_at_a_time(store: CheckpointStore) -> None:
    slow = Slow()
    slow.may_go_on.set()
    store.save(run_state(1), slow, in_background=True)
    with pytest.raises(AssertionError, match="one at a time"):
        store.save(run_state(2), slow)
    store.finish()


def test_a_copy_is_not_changed_by_training() -> None:
    weight = torch.arange(6.0)
    scaler = {"scale": [1.0]}
    state = {"module": {"a": weight, "tied": weight}, "views": [weight[:3], weight[3:]], "scaler": scaler, "n": 3}
    kept = on_host(state)
    weight.zero_()
    scaler["scale"][0] = 0.0
    assert kept["module"]["a"].tolist() == [0, 1, 2, 3, 4, 5] and kept["scaler"] == {"scale": [1.0]} and kept["n"] == 3
    assert kept["module"]["tied"] is kept["module"]["a"], "once"
    assert [view.tolist() for view in kept["views"]] == [[0, 1, 2], [3, 4, 5]]
    assert kept["views"][0].untyped_storage().nbytes() == 12, "no more than it shows"


def test_a_part_that_is_written_already_is_only_hashed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.txt").write_text("x")
    (tmp_path / "c.txt").write_text("xyz")
    parts = [Part(tmp_path / "a"), Part(tmp_path / "c.txt"), Part(tmp_path / "nothing")]
    records = Writing(tmp_path, parts).finish()
    assert {name: record["size"] for name, record in records.items()} == {"a/b.txt": 1, "c.txt": 3}


def test_numbers_that_change_meanwhile_are_those_of_the_step(store: CheckpointStore) -> None:
    """A line that has begun would count a step twice after the resume."""
    window = Window({"loss": 0.5, "num_pairs": 2.0}, num_steps=1)
    state = run_state(1, metrics_window=window.to_json())
    slow = Slow()
    assert store.save(state, slow, in_background=True) is None
    slow.may_go_on.set()
    window.add({"loss": 0.25, "num_pairs": 2.0})
    state.metrics_window["num_steps"] = 7
    state.config["train"]["shuffle"] = False
    folder = store.finish()
    assert folder is not None
    kept = store.load_state(folder)
    assert kept.metrics_window == {"num_steps": 1, "num_skipped": 0, "sums": {"loss": 0.5, "num_pairs": 2.0}}
    assert kept.config["train"]["shuffle"] is True


def test_a_window_gives_away_a_copy() -> None:
    window = Window({"loss": 0.5}, num_steps=1)
    given = window.to_json()
    window.add({"loss": 0.25})
    assert given["sums"] == {"loss": 0.5}
