"""What a checkpoint's readers refuse although every hash is right: changed by hand, by another version, elsewhere."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dpo_dist.checkpoint import CheckpointStore, verify
from dpo_dist.checkpoint.manifest import Manifest
from dpo_dist.errors import CheckpointError, NumericsError
from tests.run_states import run_state
from tests.tiny_engine import QUIET
from tests.unit.test_checkpoint import ALONE, rewrite_manifest, save_steps, write_plain

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]


@pytest.fixture
def checkpoints(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path, ALONE)


NOT_NUMBERS = ["Infinity", "-Infinity", "NaN", "1e999", "1" + 30 * "0"]
UNKNOWN: list[tuple[str, ...]] = [("sead",), ("health", "seed"), ("health", "sums", "seed"), ("metrics_window", "seed")]
UNKNOWN += [("metrics_window", "sums", "seed")]


def change_state(folder: Path, place: tuple[str, ...], number: str) -> None:
    """Write a number, as it stands in JSON, at a place of the state, in a checkpoint that is whole otherwise."""
    values = json.loads((folder / "state.json").read_text())
    inner = values
    for key in place[:-1]:
        inner = inner.setdefault(key, {})
    inner[place[-1]] = "a number"
    (folder / "state.json").write_text(json.dumps(values).replace('"a number"', number))
    rewrite_manifest(folder)


@pytest.mark.parametrize("place", UNKNOWN, ids=".".join)
def test_a_state_with_an_unknown_field_is_passed_over(checkpoints: CheckpointStore, place: tuple[str, ...]) -> None:
    older, newer = save_steps(checkpoints, 1, 2)
    change_state(newer, place, "1")
    with pytest.raises(CheckpointError, match=r"state\.json does not hold the state of a run: .*" + place[-1]):
        verify(newer)
    assert checkpoints.find("auto") == older


@pytest.mark.parametrize("look_only", [False, True])
@pytest.mark.parametrize("number", [*NOT_NUMBERS, "1" + 5000 * "0"])
@pytest.mark.parametrize(
    "place",
    [("step",), ("metrics_window", "sums", "tokens_processed"), ("health", "best"), ("config", "train", "seed")],
)
def test_a_state_with_a_number_nobody_can_use_is_passed_over(
    checkpoints: CheckpointStore, place: tuple[str, ...], number: str, look_only: bool
) -> None:
    older, newer = save_steps(checkpoints, 1, 2)
    change_state(newer, place, number)
    with pytest.raises(CheckpointError, match=r"state\.json does not hold the state of a run: the number .* is "):
        verify(newer)
    assert checkpoints.find("auto", look_only) == older


@pytest.mark.parametrize("number", [*NOT_NUMBERS, "-1", "1.5", '"1"', "true"])
@pytest.mark.parametrize("key", ["sequence", "size"])
def test_a_manifest_with_a_number_nobody_can_use_is_passed_over(
    checkpoints: CheckpointStore, key: str, number: str
) -> None:
    older, newer = save_steps(checkpoints, 1, 2)
    manifest = newer / "manifest.json"
    values = json.loads(manifest.read_text())
    (values if key == "sequence" else values["files"]["state.json"])[key] = "a number"
    manifest.write_text(json.dumps(values).replace('"a number"', number))
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        verify(newer)
    assert checkpoints.find("auto") == older
    save_steps(checkpoints, 3)


@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
def test_json_that_is_nested_without_end_is_passed_over(checkpoints: CheckpointStore, name: str) -> None:
    older, newer = save_steps(checkpoints, 1, 2)
    (newer / name).write_text(100_000 * "[")
    if name == "state.json":
        rewrite_manifest(newer)
    with pytest.raises(CheckpointError, match=rf"{name} .*nested too deeply"):
        verify(newer)
    assert checkpoints.find("auto") == older


def test_the_room_that_is_needed_is_not_read_from_a_damaged_manifest(checkpoints: CheckpointStore) -> None:
    (folder,) = save_steps(checkpoints, 1)
    manifest = Manifest.read(folder)
    huge = {name: replace(record, size=2**60) for name, record in manifest.files.items()}
    Manifest(manifest.sequence, huge).write(folder)
    save_steps(checkpoints, 2)
    assert checkpoints.find("auto") == checkpoints.path_of(2)


def test_only_looking_reads_the_state_through(checkpoints: CheckpointStore) -> None:
    """A seed that a flipped bit has changed would be told as another run's."""
    older, newer = save_steps(checkpoints, 1, 2)
    state = newer / "state.json"
    state.write_text(state.read_text().replace('"seed": 42', '"seed": 43'))
    assert checkpoints.find("auto", look_only=True) == older


def test_a_state_that_could_not_be_read_is_not_written(checkpoints: CheckpointStore) -> None:
    (older,) = save_steps(checkpoints, 1)
    state = run_state(2, metrics_window={"num_steps": 1, "sums": {"loss": float("inf")}})
    with pytest.raises(NumericsError, match="the state after step 2 cannot be saved"):
        checkpoints.save(state, write_plain)
    assert checkpoints.find("auto") == older


@pytest.mark.parametrize("place", [("step",), ("health", "best_step"), ("config", "train")], ids=".".join)
def test_a_value_of_another_type_is_told_in_one_line(checkpoints: CheckpointStore, place: tuple[str, ...]) -> None:
    (folder,) = save_steps(checkpoints, 1)
    change_state(folder, place, '"text"')
    with pytest.raises(CheckpointError, match=rf"the state of a run: \S*{place[-1]}: Input should be a") as caught:
        verify(folder)
    assert "\n" not in str(caught.value)
