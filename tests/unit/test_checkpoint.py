"""Saving, verifying, finding and restoring checkpoints: real files, real damage, real kills, real DeepSpeed."""

import contextlib
import errno
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dpo_dist.checkpoint import CheckpointStore, changed_settings, listing, require_same, store, verify
from dpo_dist.checkpoint.files import human_bytes
from dpo_dist.checkpoint.manifest import Manifest, hash_file, list_files
from dpo_dist.checkpoint.pickles import load_restricted, require_harmless
from dpo_dist.checkpoint.state import write_rng
from dpo_dist.distributed import Ranks
from dpo_dist.errors import CheckpointError, NoUsableCheckpointError
from dpo_dist.phases import arm
from tests.run_states import draw, run_state

ROOT = Path(__file__).parents[2]
ALONE = Ranks(0, 1, 0, torch.device("cpu"))
SHARD = "shards/mp_rank_00_model_states.pt"


def write_plain(folder: Path, value: float = 1.0, size: int = 64) -> None:
    """Shards without DeepSpeed."""
    (folder / "shards").mkdir()
    torch.save({"module": {"model.w": torch.full((size,), value)}}, folder / SHARD)
    torch.save({"step": 3}, folder / "shards/optim_states.pt")


@pytest.fixture
def checkpoints(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path, ALONE)


def save_steps(checkpoints: CheckpointStore, *steps: int) -> list[Path]:
    return [checkpoints.save(run_state(step), lambda f, s=step: write_plain(f, float(s))) for step in steps]


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def rewrite_manifest(folder: Path) -> None:
    """What somebody does who changes a checkpoint on purpose."""
    files = {name: hash_file(folder / name) for name in list_files(folder)}
    Manifest(Manifest.read(folder).sequence, files).write(folder)


# ---- what a checkpoint is


def test_a_checkpoint_holds_the_state_exactly_and_lists_every_file(checkpoints: CheckpointStore) -> None:
    state = run_state(12, metrics_window={"num_steps": 3, "sums": {"loss": 0.1 + 0.2, "kl": 5e-324, "entropy": 3}})
    folder = checkpoints.save(state, write_plain, lambda f: (f / "extra.txt").write_text("x"))

    assert folder == checkpoints.folder / "step-000012"
    assert checkpoints.load_state(folder) == state
    assert names_in(checkpoints.folder) == {"step-000012", "latest"}
    assert (checkpoints.folder / "latest").read_text() == "step-000012\n"
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    assert sorted(listed) == list_files(folder)
    assert {"state.json", SHARD, "extra.txt", "rng-rank00000.json", "rng-rank00000.safetensors"} <= set(listed)
    verify(folder)


def test_nothing_to_resume(checkpoints: CheckpointStore) -> None:
    assert checkpoints.find("auto") is None
    save_steps(checkpoints, 1)
    assert checkpoints.find("never") is None


def test_auto_takes_the_newest(checkpoints: CheckpointStore) -> None:
    folders = save_steps(checkpoints, 2, 10, 1_000_000)
    assert [f.name for f in folders] == ["step-000002", "step-000010", "step-1000000"]
    assert checkpoints.find("auto") == folders[-1]
    assert checkpoints.find(str(folders[0])) == folders[0]


def test_only_looking_changes_nothing_and_reads_through_nothing(checkpoints: CheckpointStore) -> None:
    first, second = save_steps(checkpoints, 2, 10)
    (checkpoints.folder / ".tmp-step-000012").mkdir()  # somebody is saving at this moment
    shard = second / SHARD
    shard.write_bytes(bytes(shard.stat().st_size))
    assert checkpoints.find("auto", look_only=True) == second
    assert checkpoints.find(str(second), look_only=True) == second
    assert (checkpoints.folder / ".tmp-step-000012").is_dir()
    shard.unlink()
    assert checkpoints.find("auto", look_only=True) == first
    assert checkpoints.find("auto") == first
    assert not (checkpoints.folder / ".tmp-step-000012").exists()


def test_newest_is_the_last_saved_not_the_highest_step(tmp_path: Path) -> None:
    """A run that went back to step 10 must not resume from the branch it has left, nor keep that branch instead."""
    checkpoints = CheckpointStore(tmp_path, ALONE, save_total_limit=2)
    save_steps(checkpoints, 10, 20, 15)
    assert checkpoints.find("auto").name == "step-000015"
    assert names_in(checkpoints.folder) == {"step-000020", "step-000015", "latest"}


def test_random_generators_continue_where_they_stood(checkpoints: CheckpointStore) -> None:
    # Not through `save`: beartype, which checks the package's calls in tests, draws from python's generator there.
    draw()  # leaves half of a pair of normal numbers behind in python's and numpy's generator
    checkpoints.folder.mkdir()
    write_rng(checkpoints.folder, 0)
    expected = [draw(), draw()]
    assert [draw(), draw()] != expected
    checkpoints.restore_rng(checkpoints.folder)
    assert [draw(), draw()] == expected


def test_a_rank_that_was_not_there_takes_the_random_state_of_another(tmp_path: Path) -> None:
    drawn = []
    for rank in range(2):
        torch.manual_seed(rank)
        write_rng(tmp_path, rank)
        drawn.append(torch.rand(3).tolist())
    for rank in range(4):
        CheckpointStore(tmp_path, Ranks(rank, 4, rank, torch.device("cpu"))).restore_rng(tmp_path)
        assert torch.rand(3).tolist() == drawn[rank % 2]
    (tmp_path / "rng-rank00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match="random state of rank 1 cannot be restored"):
        CheckpointStore(tmp_path, Ranks(3, 4, 3, torch.device("cpu"))).restore_rng(tmp_path)


@pytest.mark.parametrize("change", ["missing", "unknown", "type", "no object"])
def test_a_state_of_another_form_is_refused(checkpoints: CheckpointStore, change: str) -> None:
    (folder,) = save_steps(checkpoints, 1)
    values = json.loads((folder / "state.json").read_text())
    if change == "missing":
        del values["seed"]
    elif change == "unknown":
        values["sead"] = 1
    elif change == "type":
        values["step"] = "1"
    text = "[]" if change == "no object" else json.dumps(values)
    (folder / "state.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"state\.json does not hold the state of a run"):
        checkpoints.load_state(folder)


def test_another_run_is_refused_by_what_differs(checkpoints: CheckpointStore) -> None:
    (folder,) = save_steps(checkpoints, 1)
    require_same(folder, {"train.seed": (42, 42), "the data": ("a", "a")})
    with pytest.raises(
        CheckpointError, match=r"another run: the data=a \(this run: b\), train.seed=42 \(this run: 43\)"
    ):
        require_same(folder, {"the data": ("a", "b"), "the reference": ("r", "r"), "train.seed": (42, 43)})


def test_settings_that_changed_since_a_checkpoint_are_told() -> None:
    saved = run_state()  # train: learning_rate 5e-7, shuffle; model: revision null
    assert changed_settings(saved, saved.config) == []
    now = {
        "train": {"learning_rate": 1e-6, "shuffle": True, "output_dir": "elsewhere"},
        "model": {"revision": None},
        "checkpoint": {"resume": "auto"},
        "log": {"logging_steps": 3},
        "loss": {"beta": 0.2},
    }
    assert changed_settings(saved, now) == ["loss.beta: None -> 0.2", "train.learning_rate: 5e-07 -> 1e-06"]


def test_another_number_of_processes_is_found(checkpoints: CheckpointStore) -> None:
    folder = checkpoints.save(run_state(1, world_size=4), write_plain)
    assert folder is not None and checkpoints.find("auto") == checkpoints.find(str(folder)) == folder


# ---- damage


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "flipped byte in a shard": (SHARD, flip_byte),
    "flipped byte in the state": ("state.json", flip_byte),
    "flipped byte in a random state": ("rng-rank00000.safetensors", flip_byte),
    "flipped byte in the manifest": ("manifest.json", flip_byte),
    "truncated shard": (SHARD, lambda path: os.truncate(path, path.stat().st_size - 1)),
    "empty shard": (SHARD, lambda path: os.truncate(path, 0)),
    "empty manifest": ("manifest.json", lambda path: os.truncate(path, 0)),
    "missing shard": (SHARD, Path.unlink),
    "missing manifest": ("manifest.json", Path.unlink),
    "missing state": ("state.json", Path.unlink),
    "foreign file": ("shards/zero_pp_rank_9_mp_rank_00_optim_states.pt", lambda path: path.write_bytes(b"x")),
    "symbolic link": (SHARD, lambda path: (path.rename(path.parents[2] / "moved"), path.symlink_to("../../moved"))),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_or_refused_by_name(
    checkpoints: CheckpointStore, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = save_steps(checkpoints, 1, 2)
    name, hurt = DAMAGE[damage]
    hurt(newer / name)

    assert checkpoints.find("auto") == older
    assert f"{newer}" in caplog.text and Path(name).name in caplog.text and "skips" in caplog.text
    with pytest.raises(CheckpointError) as caught:
        checkpoints.find(str(newer))
    assert type(caught.value) is CheckpointError and caught.value.exit_code == 2
    assert Path(name).name in str(caught.value) and f"checkpoint.resume={newer}" in str(caught.value)


def test_each_file_is_read_by_one_of_the_ranks_that_share_them(checkpoints: CheckpointStore) -> None:
    (folder,) = save_steps(checkpoints, 1)
    for name in list_files(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(bytes([content[0] ^ 1]) + content[1:])
        noticed = []
        for share in [(0, 3), (1, 3), (2, 3)]:
            try:
                verify(folder, share)
            except CheckpointError as error:
                assert name in str(error)
                noticed.append(share)
        assert len(noticed) == (3 if name == "state.json" else 1), name  # which all ranks read in any case
        (folder / name).write_bytes(content)
    verify(folder)


def test_no_usable_checkpoint_is_an_error_of_its_own(checkpoints: CheckpointStore) -> None:
    for folder in save_steps(checkpoints, 1, 2):
        flip_byte(folder / SHARD)
    with pytest.raises(NoUsableCheckpointError, match="none of the 2 checkpoints") as caught:
        checkpoints.find("auto")
    assert caught.value.exit_code == 3
    assert "step-000001" in str(caught.value) and "step-000002" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"), [(None, "is missing"), ("", "is empty"), ("step-000099\n", "names 'step-000099'")]
)
def test_latest_is_not_trusted(
    checkpoints: CheckpointStore, content: str | None, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    _, newer = save_steps(checkpoints, 1, 2)
    latest = checkpoints.folder / "latest"
    latest.unlink() if content is None else latest.write_text(content)
    assert checkpoints.find("auto") == newer
    assert says in caplog.text and "step-000002" in caplog.text


def test_a_path_that_is_no_checkpoint(checkpoints: CheckpointStore, tmp_path: Path) -> None:
    save_steps(checkpoints, 1, 2)
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for path, says in [
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path / "file", "is not a folder"),
        (tmp_path / "empty", "has no manifest.json"),
        (tmp_path, r"did you mean .*step-000002\?"),
        (checkpoints.folder, r"did you mean .*step-000002\?"),
        (checkpoints.folder / "latest", r"did you mean .*step-000002\?"),
    ]:
        with pytest.raises(CheckpointError, match=says) as caught:
            checkpoints.find(str(path))
        assert type(caught.value) is CheckpointError


@pytest.mark.parametrize("name", ["../outside", "shards/../../outside", "/etc/hostname", ".", "./state.json", "a//b"])
def test_a_manifest_cannot_point_outside(checkpoints: CheckpointStore, tmp_path: Path, name: str) -> None:
    (folder,) = save_steps(checkpoints, 1)
    (checkpoints.folder / "outside").write_text("x")
    values = json.loads((folder / "manifest.json").read_text())
    values["files"][name] = {"size": 1, "sha256": hash_file(checkpoints.folder / "outside").sha256}
    (folder / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="does not stay in the folder"):
        verify(folder)


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"format": "dpo_dist checkpoint 1", "sequence": 0, "files": {"a": 3}}', "null", "\xff"]
)
def test_a_manifest_of_another_form(checkpoints: CheckpointStore, content: str) -> None:
    (folder,) = save_steps(checkpoints, 1)
    (folder / "manifest.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        verify(folder)


def test_linked_folders_are_refused(checkpoints: CheckpointStore, tmp_path: Path) -> None:
    (folder,) = save_steps(checkpoints, 1)
    (folder / "shards").rename(tmp_path / "shards")
    (folder / "shards").symlink_to(tmp_path / "shards")
    with pytest.raises(CheckpointError, match="shards is a link"):
        verify(folder)


# ---- a checkpoint that wants to run code


class RunsCode:
    """Unpickled, it creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def torch_archive(path: Path, protocol: int, payload: object) -> None:
    torch.save({"step": 3, "payload": payload}, path, pickle_protocol=protocol)


def legacy_pickle(path: Path, protocol: int, payload: object) -> None:
    path.write_bytes(pickle.dumps(payload, protocol=protocol))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(("write", "protocol"), [(torch_archive, 2), (torch_archive, 4), (legacy_pickle, 2)])
def test_evil_shard_is_refused_before_it_runs(
    checkpoints: CheckpointStore, tmp_path: Path, write, protocol: int
) -> None:
    older, folder = save_steps(checkpoints, 1, 2)
    marker = tmp_path / "was-run"
    write(folder / "shards/optim_states.pt", protocol, RunsCode(marker))
    rewrite_manifest(folder)  # sizes and hashes are right

    with pytest.raises(CheckpointError, match=r"optim_states\.pt"):
        checkpoints.find(str(folder))
    assert checkpoints.find("auto") == older
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        load_restricted(folder / "shards/optim_states.pt")
    assert not marker.exists()
    # The same file in the hands of plain torch.load, which is what DeepSpeed calls: this is what is prevented.
    with contextlib.suppress(RuntimeError):  # what it finds after running the code is no torch file
        torch.load(folder / "shards/optim_states.pt", weights_only=False)
    assert marker.exists()


def test_message_names_what_a_shard_wants_to_import(tmp_path: Path) -> None:
    torch_archive(tmp_path / "evil.pt", 2, RunsCode(tmp_path / "marker"))
    with pytest.raises(CheckpointError, match=r"evil\.pt would import posix\.system"):
        require_harmless(tmp_path / "evil.pt", "evil.pt")


def test_torchscript_archive_is_refused(tmp_path: Path) -> None:
    torch.save({"a": 1}, tmp_path / "script.pt")
    with zipfile.ZipFile(tmp_path / "script.pt", "a") as archive:
        archive.writestr("script/constants.pkl", b"\x80\x02).")
    with pytest.raises(CheckpointError, match="can be inspected"):
        require_harmless(tmp_path / "script.pt", "script.pt")


def test_a_shard_that_could_not_be_loaded_again_is_refused_when_it_is_saved(checkpoints: CheckpointStore) -> None:
    save_steps(checkpoints, 1)

    def write_unloadable(folder: Path) -> None:
        torch.save({"config": Path("x")}, folder / "a.pt")

    with pytest.raises(CheckpointError, match=r"a\.pt would import pathlib"):
        checkpoints.save(run_state(2), write_unloadable)
    assert names_in(checkpoints.folder) == {"step-000001", "latest"}


# ---- a save that fails


@pytest.fixture
def small_file_limit():
    """No file of this process may grow over 100 kB: what a full disk does to torch.save, safetensors and write()."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)  # Python ignores SIGXFSZ, so that writes fail instead
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


WRITERS = {
    "torch": lambda folder: write_plain(folder, size=100_000),
    "safetensors": lambda folder: save_file({"w": torch.zeros(100_000)}, folder / "w.safetensors"),
    "write": lambda folder: (folder / "w.bin").write_bytes(bytes(200_000)),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_full_disk(checkpoints: CheckpointStore, small_file_limit, writer: str) -> None:
    (older,) = save_steps(checkpoints, 1)
    needed = human_bytes(Manifest.read(older).num_bytes)
    small_file_limit()
    with pytest.raises(CheckpointError, match=rf"disk full: need {needed}, have \d"):
        checkpoints.save(run_state(2), WRITERS[writer])
    assert names_in(checkpoints.folder) == {"step-000001", "latest"}
    assert checkpoints.find("auto") == older

    (newer,) = save_steps(checkpoints, 3)  # there is room for this one
    assert checkpoints.find("auto") == newer


def test_full_disk_at_the_first_save(checkpoints: CheckpointStore, small_file_limit) -> None:
    small_file_limit()
    with pytest.raises(CheckpointError, match="disk full: need more than was left, have "):
        checkpoints.save(run_state(1), WRITERS["torch"])
    assert checkpoints.find("auto") is None


def test_no_room_is_noticed_before_writing(checkpoints: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    save_steps(checkpoints, 1)
    monkeypatch.setattr(store, "free_bytes", lambda folder: 10)
    with pytest.raises(CheckpointError, match=r"disk full: need .* KiB, have 10 bytes"):
        checkpoints.save(run_state(2), lambda folder: pytest.fail("it wrote"))
    assert names_in(checkpoints.folder) == {"step-000001", "latest"}


@pytest.mark.parametrize(
    ("error", "kind"), [(OSError(errno.EIO, "Input/output error"), CheckpointError), (TypeError("a bug"), TypeError)]
)
def test_other_errors_of_a_save(checkpoints: CheckpointStore, error: Exception, kind: type[Exception]) -> None:
    save_steps(checkpoints, 1)

    def fail(folder: Path) -> None:
        raise error

    with pytest.raises(kind, match=r"Input/output error|a bug"):
        checkpoints.save(run_state(2), fail)
    assert names_in(checkpoints.folder) == {"step-000001", "latest"}


# ---- saves that are killed


def killed_save(run_dir: Path, phase: str) -> None:
    """Runs in a process of its own: saves step 2, and is killed just before one of the last things a save does."""

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if phase != "replacing":
        arm(f"kill@0:*:save.{phase}", 0)
    else:  # the former checkpoint of the step is out of the way, the new one not yet in its place
        rename = os.rename
        os.rename = lambda old, new: die() if Path(old).name.startswith(".tmp") else rename(old, new)
    save_steps(CheckpointStore(run_dir, ALONE), 2)


def killed_saves(root: Path) -> None:
    """Runs as a script: one killed process per phase; imports once."""
    for phase in PHASES:
        if (child := os.fork()) == 0:
            killed_save(root / phase, phase)
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


PHASES = ("written", "manifest", "publish", "latest", "replacing")


@pytest.fixture(scope="module")
def killed_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder per phase: step 1 (and for `replacing` step 2) complete, then a save of step 2 that was killed."""
    root = tmp_path_factory.mktemp("killed")
    for phase in PHASES:
        save_steps(CheckpointStore(root / phase, ALONE), *((1, 2) if phase == "replacing" else (1,)))
    subprocess.run(
        [sys.executable, __file__, str(root)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
    )
    return root


@pytest.mark.parametrize(
    ("phase", "resumes_from", "reports"),
    [
        ("written", "step-000001", ".tmp-step-000002 removed"),
        ("manifest", "step-000001", ".tmp-step-000002 removed"),
        ("publish", "step-000001", ".tmp-step-000002 removed"),
        ("latest", "step-000002", "names 'step-000001'"),
        ("replacing", "step-000002", "step-000002 restored"),
    ],
)
def test_sigkill_in_a_save(
    killed_runs: Path, phase: str, resumes_from: str, reports: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = CheckpointStore(killed_runs / phase, ALONE)
    before = names_in(checkpoints.folder)
    expected = {"latest": "step-000002", "replacing": ".replaced-step-000002"}
    assert expected.get(phase, ".tmp-step-000002") in before
    found = checkpoints.find("auto")
    assert found.name == resumes_from
    assert reports in caplog.text
    assert not [name for name in names_in(checkpoints.folder) if name.startswith(".")]
    save_steps(checkpoints, 3)
    assert checkpoints.find("auto").name == "step-000003"


# ---- the folder over time


def test_a_step_saved_again_replaces_the_first(checkpoints: CheckpointStore) -> None:
    save_steps(checkpoints, 1)
    folder = checkpoints.save(run_state(1, num_tokens=7), lambda f: write_plain(f, 9.0))
    assert checkpoints.load_state(folder).num_tokens == 7
    assert names_in(checkpoints.folder) == {"step-000001", "latest"}
    assert checkpoints.find("auto") == folder


def test_retention_deletes_only_our_own_checkpoints(tmp_path: Path) -> None:
    keeps_all = CheckpointStore(tmp_path / "run", ALONE)
    (outside,) = save_steps(CheckpointStore(tmp_path / "elsewhere", ALONE), 1)
    save_steps(keeps_all, 1, 2)
    (keeps_all.folder / "step-000003").symlink_to(outside)
    (keeps_all.folder / "step-000004").mkdir()
    (keeps_all.folder / "step-000004/notes.txt").write_text("mine")
    shutil.copytree(outside, keeps_all.folder / "step-7")
    shutil.copytree(outside, keeps_all.folder / "best-step-000001")

    save_steps(CheckpointStore(tmp_path / "run", ALONE, save_total_limit=1), 5)
    kept = {"step-000003", "step-000004", "step-7", "best-step-000001", "step-000005", "latest"}
    assert names_in(keeps_all.folder) == kept
    verify(outside)


def test_failing_to_delete_does_not_fail_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = CheckpointStore(tmp_path, ALONE, save_total_limit=1)
    save_steps(checkpoints, 1)
    remove = listing.remove_path

    def refuse(path: Path) -> None:
        if "deleted" in path.name:
            raise PermissionError(errno.EACCES, "Permission denied")
        remove(path)

    monkeypatch.setattr(listing, "remove_path", refuse)
    (newer,) = save_steps(checkpoints, 2)
    assert checkpoints.find("auto") == newer
    assert "cannot be deleted" in caplog.text


if __name__ == "__main__":
    killed_saves(Path(sys.argv[1]))
