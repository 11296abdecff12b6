"""Checkpoints of DeepSpeed engines: exact resume at every stage, restricted loading, two ranks, one of which fails."""

import json
import os
import resource
import socket
import subprocess
import sys
from collections import OrderedDict, namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum
from torch.serialization import get_unsafe_globals_in_checkpoint

from dpo_dist.checkpoint import CheckpointStore, export_checkpoint, export_model, load_shards, save_shards
from dpo_dist.checkpoint.pickles import ALLOWED_GLOBALS
from dpo_dist.checkpoint.shards import without_enums
from dpo_dist.distributed import process_group
from dpo_dist.errors import CheckpointError
from tests.launching import end_rank
from tests.run_states import draw, run_state
from tests.tiny_engine import QUIET, full_parameters_of, make_engine, only_rank, save_engine, tiny_config, train

ROOT = Path(__file__).parents[2]
STAGES = (0, 1, 2, 3)
DTYPES = (torch.float32, torch.bfloat16)
pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]

seen_globals: dict[str, set[str]] = {}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stage", STAGES)
def test_resume_is_exact(tmp_path: Path, stage: int, dtype: torch.dtype) -> None:
    checkpoints = CheckpointStore(tmp_path, only_rank())
    engine = make_engine(stage, dtype)
    train(engine, 2, seed=1)
    folder = save_engine(checkpoints, engine, run_state(), dtype)
    uninterrupted = train(engine, 3, seed=2)

    resumed = make_engine(stage, dtype)
    assert checkpoints.find("auto") == folder
    load_shards(resumed, folder)
    assert train(resumed, 3, seed=2) == uninterrupted
    for (name, mine), (_, theirs) in zip(full_parameters_of(engine), full_parameters_of(resumed), strict=True):
        assert torch.equal(mine, theirs), name

    assert train(make_engine(stage, dtype), 3, seed=2) != uninterrupted  # the test can tell a resume from a new start
    assert not list(folder.rglob("*.py")), "DeepSpeed's executable scripts"
    shards = list(folder.rglob("*.pt"))
    seen_globals[f"{stage} {dtype}"] = {g for path in shards for g in get_unsafe_globals_in_checkpoint(str(path))}


@pytest.mark.parametrize("stage", STAGES)
def test_no_shard_holds_an_enumeration(tmp_path: Path, stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.11.2, Debian 12's, pickles a member as a call of getattr: no checkpoint could be saved there."""
    monkeypatch.setattr(ZeroStageEnum, "__reduce_ex__", lambda self, protocol: (getattr, (type(self), self.name)))
    engine = make_engine(stage, torch.float32)
    train(engine, 1, seed=1)
    folder = save_engine(CheckpointStore(tmp_path, only_rank()), engine, run_state(), torch.float32)
    load_shards(make_engine(stage, torch.float32), folder)


def test_what_stands_for_an_enumeration_keeps_its_form() -> None:
    pair = namedtuple("pair", "a b")
    held = OrderedDict(stage=ZeroStageEnum.weights, nested=[(ZeroStageEnum.gradients, "x"), pair(1, 2)])
    plain = without_enums(held)
    assert plain == OrderedDict(stage=3, nested=[(2, "x"), pair(1, 2)])
    assert type(plain) is OrderedDict and type(plain["stage"]) is int and type(plain["nested"][1]) is pair


def test_allow_list_is_what_deepspeed_needs_and_no_more() -> None:
    """Runs after the tests above, on the shards they wrote."""
    if len(seen_globals) < len(STAGES) * len(DTYPES):
        pytest.fail("needs the shards of every stage: run the whole file")
    only_on_gpu = {"deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"}
    assert set().union(*seen_globals.values()) == set(ALLOWED_GLOBALS) - only_on_gpu


class RunsCode:
    """Unpickled, it creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize(
    ("stage", "pattern"), [(0, "*model_states.pt"), (3, "*model_states.pt"), (3, "*optim_states.pt")]
)
def test_deepspeed_loads_restricted(tmp_path: Path, stage: int, pattern: str) -> None:
    """Even a shard that was exchanged after the verification runs nothing."""
    engine = make_engine(stage, torch.float32)
    folder = save_engine(CheckpointStore(tmp_path, only_rank()), engine, run_state(), torch.float32)
    (path,) = folder.rglob(pattern)
    content = torch.load(path, weights_only=False)
    torch.save({**content, "payload": RunsCode(tmp_path / "was-run")}, path)

    target = make_engine(stage, torch.float32)
    with pytest.raises(CheckpointError, match="holds more than tensors and plain values"):
        load_shards(target, folder)
    assert not (tmp_path / "was-run").exists()
    assert type(target.checkpoint_engine).__name__ == "TorchCheckpointEngine"  # put back
    target.load_checkpoint(str(folder), tag="shards")  # what it prevents
    assert (tmp_path / "was-run").exists()


@pytest.mark.parametrize("stage", [0, 3])
def test_shards_of_another_model_or_none_at_all(tmp_path: Path, stage: int) -> None:
    engine = make_engine(stage, torch.float32)
    folder = save_engine(CheckpointStore(tmp_path, only_rank()), engine, run_state(), torch.float32)
    with pytest.raises(CheckpointError, match=r"does not fit the model|in the model that is trained"):
        load_shards(make_engine(stage, torch.float32, tiny_config(layers=3)), folder)
    with pytest.raises(CheckpointError, match=r"holds no shards|does not fit"):
        load_shards(make_engine(stage, torch.float32), tmp_path)


@pytest.mark.parametrize("stage", [0, 3])
def test_training_goes_on_after_a_failed_save(tmp_path: Path, stage: int) -> None:
    checkpoints = CheckpointStore(tmp_path, only_rank())
    expected = train(make_engine(stage, torch.float32), 4, seed=1)
    engine = make_engine(stage, torch.float32)
    assert train(engine, 4, seed=1) == expected

    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(CheckpointError, match="disk full"):
            save_engine(checkpoints, engine, run_state(), torch.float32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert list(checkpoints.folder.iterdir()) == []

    folder = save_engine(checkpoints, engine, run_state(), torch.float32)
    resumed = make_engine(stage, torch.float32)
    load_shards(resumed, folder)
    assert train(engine, 2, seed=3) == train(resumed, 2, seed=3)


# ---- two ranks, launched once


def attempt(action) -> str:
    try:
        return f"returned {action()}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def fail_on_rank_1(ranks, action) -> str:
    """Run a collective action with a full disk on rank 1 only."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000 if ranks.rank == 1 else hard, hard))
    try:
        return attempt(action)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def two_rank_story(root: Path, stage: int, dtype: torch.dtype, ranks) -> dict[str, Any]:
    """What one rank of two sees of a run's life; the test reads both."""
    checkpoints = CheckpointStore(root / f"stage-{stage}", ranks)
    seen: dict[str, Any] = {}
    engine = make_engine(stage, dtype)
    train(engine, 2, seed=ranks.rank)
    torch.manual_seed(100 + ranks.rank)
    first = save_engine(checkpoints, engine, run_state(2, world_size=2), dtype)
    seen["drawn"] = draw()[2:]  # without python's generator, from which beartype draws
    model = engine.module.model
    model_folder = checkpoints.folder.parent / "model"
    arguments = {"model_config": model.config, "generation_config": model.generation_config, "dtype": dtype}
    parameters = ((name, whole if ranks.is_first else None) for name, whole in full_parameters_of(engine))
    export_model(model_folder, parameters, ranks, **arguments)

    seen["losses"] = train(engine, 2, seed=10 + ranks.rank)
    second = run_state(4, world_size=2)
    seen["full disk"] = fail_on_rank_1(ranks, lambda: save_engine(checkpoints, engine, second, dtype))
    seen["foreign rank"] = attempt(lambda: checkpoints.save(second, lambda folder: 1 / (1 - ranks.rank) and None))
    seen["no parameters"] = attempt(
        lambda: export_model(checkpoints.folder.parent / "empty", iter([]), ranks, **arguments)
    )
    seen["folder"] = sorted(path.name for path in checkpoints.folder.iterdir())

    resumed = make_engine(stage, dtype)
    found = checkpoints.find("auto")
    assert found == first
    load_shards(resumed, found)
    checkpoints.restore_rng(found)
    seen["drawn again"] = draw()[2:]
    seen["losses again"] = train(resumed, 2, seed=10 + ranks.rank)

    damaged = save_engine(checkpoints, resumed, second, dtype)
    if ranks.is_first:  # each file is read by one rank; damage one of each share
        for path in sorted(damaged.rglob("*.safetensors")):
            path.write_bytes(path.read_bytes()[:-1] + b"x")
    seen["found after damage"] = attempt(lambda: checkpoints.find("auto").name)
    seen["asked for damaged"] = attempt(lambda: checkpoints.find(str(damaged)))
    return seen


def two_ranks(root: Path) -> None:
    """Runs as a script, once per rank."""
    with process_group() as ranks:
        stories = {
            "2": two_rank_story(root, 2, torch.float32, ranks),
            "3": two_rank_story(root, 3, torch.bfloat16, ranks),
        }
        (root / f"rank-{ranks.rank}.json").write_text(json.dumps(stories))


@pytest.fixture(scope="module")
def two_rank_stories(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    root = tmp_path_factory.mktemp("two_ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)}
    common |= {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2"}
    processes = []
    for rank in range(2):
        environment = os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        log = (root / f"rank-{rank}.log").open("w")
        with log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, __file__, str(root)],
                    env=environment,
                    stdout=log,
                    stderr=log,
                )
            )
    try:
        codes = [process.wait(200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0], "".join((root / f"rank-{rank}.log").read_text()[-3000:] for rank in range(2))
    return root, [json.loads((root / f"rank-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("stage", ["2", "3"])
def test_two_ranks(two_rank_stories: tuple[Path, list[dict[str, Any]]], stage: str) -> None:
    root, stories = two_rank_stories
    seen = [story[stage] for story in stories]
    run_dir = root / f"stage-{stage}"

    assert seen[0]["drawn"] != seen[1]["drawn"]
    for mine in seen:
        assert mine["drawn again"] == mine["drawn"]
        assert mine["losses again"] == mine["losses"]
        assert mine["full disk"].startswith("StorageError: ") and "disk full: need" in mine["full disk"]
        assert "division by zero" in mine["foreign rank"]
        assert "parameters are missing, first " in mine["no parameters"]
        assert mine["folder"] == ["latest", "step-000002"]
        assert mine["found after damage"] == "returned step-000002"
        assert (
            mine["asked for damaged"].startswith("CheckpointError: ")
            and "safetensors has sha256" in mine["asked for damaged"]
        )
    assert seen[0]["asked for damaged"] == seen[1]["asked for damaged"]

    exported = export_checkpoint(run_dir / "checkpoints/step-000002", root / f"exported-{stage}")
    assert (exported / "model.safetensors").read_bytes() == (run_dir / "model/model.safetensors").read_bytes()
    assert not (run_dir / "empty").exists()


def test_a_write_error_does_not_leave_other_ranks_waiting(tmp_path: Path) -> None:
    """DeepSpeed's own save raises in the middle, before its last barrier; ours after it."""

    class Recorder:
        def __init__(self, engine) -> None:
            self.events: list[str] = []
            self.engine = engine
            self.checkpoint_engine = engine.checkpoint_engine

        def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            self.checkpoint_engine.save({}, str(tmp_path / "nowhere" / "file"))
            self.checkpoint_engine.save({}, str(tmp_path / "file"))
            self.events.append("barrier")

    recorder = Recorder(make_engine(0, torch.float32))
    with pytest.raises(RuntimeError, match="nowhere"):
        save_shards(recorder, tmp_path)
    assert recorder.events == ["barrier"]
    assert not (tmp_path / "file").exists()  # after the first error nothing more is written


if __name__ == "__main__":
    two_ranks(Path(sys.argv[1]))
    end_rank()
