"""`dpo-dist doctor`: every problem is produced for real where that is possible; the docs name every finding."""

import json
import os
import resource
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from dpo_dist import control_groups
from dpo_dist.attention.packages import FLASH_3
from dpo_dist.cli import app
from dpo_dist.cli.doctor import folders, software
from dpo_dist.cli.doctor import machine as limits
from dpo_dist.cli.doctor.waiting import obstacle
from tests.golden.trajectories import base_config
from tests.launching import REPOSITORY
from tests.machine import Machine


def doctor(*arguments: str, exit_code: int = 0) -> dict[str, Any]:
    """The report, with findings by name."""
    result = CliRunner().invoke(app, ["doctor", *arguments, "--json"])
    assert result.exit_code == exit_code, f"{result.output}\n{result.exception!r}"
    (line,) = result.stdout.splitlines()
    report = json.loads(line)
    return {**report, "findings": {finding["name"]: finding for finding in report["findings"]}}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A run that can start here."""
    monkeypatch.setenv("DPO_DIST_CACHE", str(tmp_path / "cache"))
    for name in ("CUDA_VISIBLE_DEVICES", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(base_config(tmp_path / "out")))
    return str(tmp_path / "run.yaml")


def problem(report: dict[str, Any], name: str) -> str:
    """The text of a finding that is a problem and has a way out."""
    finding = report["findings"][name]
    assert finding["status"] == "problem" and finding["way_out"], finding
    assert not report["can_start"] and report["status"] == "problem"
    return finding["text"]


def test_a_machine_without_a_configuration(config: str) -> None:
    report = doctor()
    assert report["can_start"] and report["num_ranks"] == 1 and report["schema_version"] == 1
    found = report["findings"]
    assert found["torch"]["values"]["version"].startswith("2.")
    assert found["memory"]["values"]["total_bytes"] > found["memory"]["values"]["available_bytes"] > 0
    assert found["CPU cores"]["values"]["usable"] == len(os.sched_getaffinity(0))
    assert found["interface lo"]["values"]["addresses"][0] == "127.0.0.1"
    assert found["attention kernels"]["values"]["usable"] == ["sdpa"]
    assert found["flash-attn 3"]["text"] == "not installed"
    assert "run folder" not in found


def test_a_configuration_that_can_start(config: str, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    report = doctor(config)
    assert report["can_start"]
    found = report["findings"]
    # 32-bit weights of a tiny model, and AdamW's two states.
    assert found["checkpoints"]["values"]["checkpoint_bytes"] == 12 * found["checkpoints"]["values"]["parameters"]
    assert found["file system"]["values"]["type"] in Path("/proc/mounts").read_text()
    assert found["locks"]["status"] == found["data.train.0"]["status"] == "ok"
    assert found["device"]["values"]["kernel"] == "sdpa"
    assert sorted(tmp_path.rglob("*")) == before  # looks only


def test_the_text_has_every_finding_and_a_verdict(config: str) -> None:
    names = doctor(config)["findings"]
    result = CliRunner().invoke(app, ["doctor", config, "model.model_name_or_path=/nowhere"])
    assert result.exit_code == 2
    assert all(f" {name} " in result.stdout for name in names if name != "checkpoints")
    assert "  problem model.model_name_or_path" in result.stdout and " -> give the folder" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("training cannot start here: 1 problem(s)")


@pytest.mark.parametrize(
    ("override", "name", "said"),
    [
        ("model.model_name_or_path=/nowhere", "model.model_name_or_path", "does not exist"),
        ("model.reference_name_or_path=/nowhere", "model.reference_name_or_path", "does not exist"),
        ("data.train.0.path=none.jsonl", "data.train.0", "does not exist"),
        ("model.attn_implementation=flash_attn model.dtype=bfloat16", "device", "needs a CUDA device"),
        ("model.use_liger_kernel=true", "device", "needs a GPU with Triton"),
        ("model.dtype=float16", "device", "float16 needs a GPU"),
        ("log.report_to=[mlflow]", "settings", "needs the package mlflow"),
        ("model.torch_compile=true adapter.peft_type=prompt_tuning", "settings", "does not go with virtual tokens"),
    ],
)
def test_what_is_asked_for_and_not_there(config: str, override: str, name: str, said: str) -> None:
    assert said in problem(doctor(config, *override.split(), exit_code=2), name)


def test_a_compiler_that_a_run_would_miss(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert doctor(config)["findings"]["settings"]["status"] == "ok"
    report = doctor(config, "model.torch_compile=true", exit_code=2)
    assert "no-such-compiler is not found" in problem(report, "settings")


def test_a_mistake_in_the_configuration_is_said_as_by_check(config: str) -> None:
    started = time.monotonic()
    result = CliRunner().invoke(app, ["doctor", config, "loss.bta=1", "--json"])
    assert time.monotonic() - started < 2
    assert result.exit_code == 2 and result.stdout == "" and "loss.bta=1 is not a key" in result.stderr


def test_a_model_of_the_hub_is_not_downloaded(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    name = "nobody/nothing-of-that-name"
    report = doctor(config, f"model.model_name_or_path={name}", f"data.train.0.path={name}", exit_code=2)
    assert "offline" in problem(report, "model.model_name_or_path")
    assert "offline" in problem(report, "data.train.0")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    report = doctor(config, f"model.model_name_or_path={name}", f"data.train.0.path={name}")
    assert report["findings"]["model.model_name_or_path"]["status"] == "warning"
    assert report["findings"]["data.train.0"]["status"] == "warning"


def test_a_file_in_place_of_a_folder(config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    assert "is a file" in problem(doctor(config, f"train.output_dir={tmp_path}/file", exit_code=2), "run folder")
    assert "cannot be made" in problem(doctor(config, f"train.output_dir={tmp_path}/file/a", exit_code=2), "run folder")
    monkeypatch.setenv("DPO_DIST_CACHE", str(tmp_path / "file" / "cache"))
    assert "cannot be written" in problem(doctor(exit_code=2), "cache")


def test_a_run_folder_that_is_full_or_in_use(config: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "something").touch()
    assert "is not empty" in problem(doctor(config, exit_code=2), "run folder")
    (out / "something").unlink()
    with _held(out / ".lock"):
        assert "another run trains" in problem(doctor(config, exit_code=2), "run folder")
    assert doctor(config)["can_start"]


@contextmanager
def _held(path: Path) -> Iterator[None]:
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _limited(kind: int, soft: int) -> Iterator[None]:
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def test_a_disk_that_takes_no_more(config: str, tmp_path: Path) -> None:
    """As a quota would: a file may have 1000 bytes. Python ignores the signal that comes with it."""
    with _limited(resource.RLIMIT_FSIZE, 1000):
        result = CliRunner().invoke(app, ["doctor", config])
    assert result.exit_code == 2 and "disk full" in result.stdout and "cannot start" in result.stdout


def test_room_for_checkpoints(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = doctor(config)["findings"]["checkpoints"]["values"]["checkpoint_bytes"]
    monkeypatch.setattr(folders, "free_bytes", lambda folder: checkpoint - 1)
    assert "a checkpoint takes about" in problem(doctor(config, exit_code=2), "checkpoints")
    monkeypatch.setattr(folders, "free_bytes", lambda folder: 2 * checkpoint - 1)
    assert doctor(config)["findings"]["checkpoints"]["status"] == "warning"
    monkeypatch.setattr(folders, "free_bytes", lambda folder: 2 * checkpoint)
    assert doctor(config)["findings"]["checkpoints"]["status"] == "ok"
    # Half as wide weights are kept once more.
    half = doctor(config, "model.dtype=bfloat16")["findings"]["checkpoints"]["values"]["checkpoint_bytes"]
    assert half * 12 == checkpoint * 14


def test_checkpoints_of_adapters_are_not_estimated(config: str) -> None:
    found = doctor(config, "adapter.peft_type=lora")["findings"]
    assert "checkpoints" not in found and found["run folder"]["status"] == "ok"


def test_limits_of_the_process(config: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with _limited(resource.RLIMIT_NOFILE, min(512, hard)):
        files = doctor()["findings"]["open files"]
    assert files["status"] == "warning" and files["values"]["soft"] == 512 and "ulimit -n" in files["way_out"]
    (tmp_path / "infiniband" / "mlx5_0").mkdir(parents=True)
    with _limited(resource.RLIMIT_MEMLOCK, 65536):
        assert doctor()["findings"]["locked memory"]["status"] == "ok"  # nothing here locks memory
        monkeypatch.setattr(limits, "INFINIBAND", tmp_path / "infiniband")
        locked = doctor()["findings"]["locked memory"]
    assert locked["status"] == "warning" and locked["values"]["soft_bytes"] == 65536


def test_more_ranks_than_cores_and_a_small_shared_memory(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5000")
    monkeypatch.setattr(limits, "_SMALL_SHARED_MEMORY", shutil.disk_usage("/dev/shm").free + (1 << 40))
    found = doctor()["findings"]
    assert found["CPU cores"]["status"] == found["shared memory"]["status"] == "warning"
    assert "--shm-size" in found["shared memory"]["way_out"]


def test_a_compiler_that_is_not_there(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor()["findings"]["compiler"]["status"] == "ok"
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert doctor()["findings"]["compiler"]["values"]["missing"] == ["the compiler no-such-compiler"]


@pytest.mark.parametrize(
    ("groups", "files", "memory", "cores"),
    [
        ("0::/job\n", {"memory.max": "max", "job/memory.max": "1000", "job/cpu.max": "150000 100000"}, 1000, 1.5),
        ("0::/\n", {"memory.max": "2000", "cpu.max": "max 100000"}, 2000, None),
        (
            "5:cpu,cpuacct:/\n4:memory:/elsewhere\n0::/\n",  # a container sees its own group as the root
            {"memory/memory.limit_in_bytes": "3000", "cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
            3000,
            None,
        ),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712"}, None, None),
    ],
)
def test_limits_of_a_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: str, files: dict[str, str], memory: int, cores: float
) -> None:
    (tmp_path / "own").write_text(groups)
    for name, text in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    monkeypatch.setattr(control_groups, "CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(control_groups, "OWN_CGROUPS", tmp_path / "own")
    assert (control_groups.memory_of_container(), control_groups.cores_of_container()) == (memory, cores)


@pytest.mark.parametrize(
    ("variable", "value", "is_there"),
    [
        ("GLOO_SOCKET_IFNAME", "lo", True),
        ("GLOO_SOCKET_IFNAME", "none0", False),
        ("NCCL_SOCKET_IFNAME", "l", True),
        ("NCCL_SOCKET_IFNAME", "=l", False),
        ("NCCL_SOCKET_IFNAME", "none", False),
        ("NCCL_SOCKET_IFNAME", "^docker", True),
        ("MASTER_ADDR", "localhost", True),
        ("MASTER_ADDR", "no such host", False),
    ],
)
def test_names_in_the_environment(
    config: str, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, is_there: bool
) -> None:
    monkeypatch.setenv(variable, value)
    if is_there:
        assert doctor()["findings"]["variables"]["values"][variable] == value
    else:
        assert value in problem(doctor(exit_code=2), variable)


def test_secrets_are_not_shown(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 20)
    monkeypatch.setenv("NCCL_OWN_TOKEN", "short")
    monkeypatch.setenv("HF_ENDPOINT", "https://me:hunter2hunter2@hub.example/hf_" + "x" * 20)
    for arguments in (["doctor"], ["doctor", "--json"]):
        printed = CliRunner().invoke(app, arguments).stdout
        assert "hub.example" in printed
        assert not [secret for secret in ("xxxx", "short", "hunter2", "NCCL_OWN_TOKEN") if secret in printed]


def test_a_gpu_that_is_asked_for_and_not_there(config: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert doctor()["findings"]["accelerators"]["text"] == "none: runs on CPU"
    assert doctor(config, "parallel.deepspeed=zero3_bf16")["findings"]["device"]["status"] == "warning"
    (tmp_path / "version").touch()
    monkeypatch.setattr(software, "DRIVER", tmp_path / "version")
    assert doctor()["findings"]["accelerators"]["status"] == "warning"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert "CUDA_VISIBLE_DEVICES=0,1" in problem(doctor(exit_code=2), "accelerators")
    monkeypatch.setenv("LOCAL_SIZE", "2")  # DeepSpeed's launcher sets the other variable on any machine
    assert doctor()["findings"]["accelerators"]["status"] == "warning"


def test_gpus_that_are_not_here(config: str, monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    """Two devices that are made up: what is said of them, and of three ranks that share them."""
    properties = SimpleNamespace(name="GPU of a test", total_memory=80 << 30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    machine.has("9.0", FLASH_3)
    found = {finding.name: finding for finding in software.software_findings({"LOCAL_WORLD_SIZE": "2"})}
    assert found["accelerator 1"].text == "GPU of a test, 80.0 GiB, compute capability 9.0"
    assert found["attention kernels"].values["usable"] == ["flash_attn", "torch", "sdpa"]
    assert "GPUs for ranks" not in found
    found = {finding.name: finding for finding in software.software_findings({"LOCAL_WORLD_SIZE": "3"})}
    assert found["GPUs for ranks"].status == "problem"
    assert obstacle(list(found.values())) is not None


def test_a_package_that_is_missing(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "REQUIRED", (*software.REQUIRED, "no-such-package"))
    assert problem(doctor(exit_code=2), "no-such-package") == "not installed"


def test_folders_of_several_nodes_must_be_shared(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setattr(folders, "file_system", lambda folder: ("ext4", "/"))
    assert "several nodes" in problem(doctor(config, exit_code=2), "file system")
    monkeypatch.setattr(folders, "file_system", lambda folder: ("nfs4", "/mnt"))
    assert doctor(config)["findings"]["file system"]["values"]["kind"] == "shared"

    # DeepSpeed's launcher: all of them are here.
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setenv("LOCAL_SIZE", "16")
    monkeypatch.setattr(folders, "file_system", lambda folder: ("ext4", "/"))
    assert doctor(config)["findings"]["file system"]["status"] == "ok"


def test_the_file_system_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest place that holds it, of two at one place the later; also of a folder that is not there yet."""
    inner = tmp_path / "a"
    inner.mkdir()
    mounts = [(str(inner), "nfs4"), (str(tmp_path), "xfs"), (str(tmp_path), "lustre"), ("/", "ext4"), ("/none", "zfs")]
    found = [SimpleNamespace(mountpoint=place, fstype=kind) for place, kind in mounts]
    monkeypatch.setattr(folders.psutil, "disk_partitions", lambda all: found)
    assert folders.file_system(inner / "new" / "out") == ("nfs4", str(inner))
    assert folders.file_system(tmp_path / "b") == ("lustre", str(tmp_path))
    assert folders.file_system(Path("/ab")) == ("ext4", "/")
    assert [folders.kind_of(one) for one in ("nfs4", "xfs", "ramfs", "fuse.new")] == [
        "shared", "local", "memory", "unknown",
    ]  # fmt: skip


def test_variables_of_a_launcher(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)  # a run in this process may have set it
    found = doctor()["findings"]["launcher"]
    assert found["status"] == "warning" and "LOCAL_RANK" in found["text"]
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert doctor()["findings"]["launcher"]["text"] == "rank 0 of 4"
    monkeypatch.setenv("MASTER_PORT", "x")
    assert "MASTER_PORT=x is not a number" in problem(doctor(exit_code=2), "launcher")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("RANK", "7")
    assert "RANK=7 with WORLD_SIZE=4" in problem(doctor(exit_code=2), "launcher")


def test_memory_is_no_disk(config: str) -> None:
    if not os.access("/dev/shm", os.W_OK):
        pytest.fail("/dev/shm cannot be written")
    own = doctor(config, f"train.output_dir=/dev/shm/dpo-dist-doctor-{os.getpid()}")["findings"]["file system"]
    assert own["values"] == {"type": "tmpfs", "mounted_at": "/dev/shm", "kind": "memory"}
    assert own["status"] == "warning"


def test_a_file_system_without_locks(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders.fcntl, "flock", lambda *_: None)  # as where locks are ignored
    assert doctor(config)["findings"]["locks"]["status"] == "warning"


def test_the_page_names_every_finding(config: str) -> None:
    page = (REPOSITORY / "docs" / "doctor.md").read_text()
    names = {
        finding["name"]
        for finding in doctor(config)["findings"].values()
        if finding["section"] != "software" or finding["name"] in ("accelerators", "attention kernels", "CUDA")
    }
    named = {name.split(" ")[0] if name.startswith("interface") else name.split(".0")[0] for name in names}
    assert not [name for name in named if f"`{name}" not in page]
