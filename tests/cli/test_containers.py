"""docker/compose.yaml against launch/container.sh, and what launch/slurm.sbatch hands to pyxis and apptainer.

No engine and neither of the two runs here: stand-ins write down the words, and run the command that they are given.
"""

import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cli.test_cluster_files import container, problems
from tests.cli.test_launch_files import FINISHES, attempt, machine
from tests.launching import REPOSITORY

__all__ = ["machine"]  # a fixture

COMPOSE = REPOSITORY / "docker" / "compose.yaml"

# ---- compose

DEVICES = [{"driver!": ("nvidia",), "count!": ("all",), "capabilities!": [("gpu",)]}]
SERVICE = {
    "image!": str,
    "profiles!": [str],
    "init!": (True,),
    "user!": str,
    "ulimits!": {"memlock!": (-1,)},
    "shm_size!": str,
    "stop_grace_period!": str,
    "working_dir!": ("/work",),
    "volumes!": [str],
    "environment!": [str],
    "command!": [str],
    "deploy": {"resources!": {"reservations!": {"devices!": DEVICES}}},
}
WHOLE = {
    "name!": str,
    "x-common!": dict,
    "services!": {"train!": SERVICE, "train-cpu!": SERVICE},
    "volumes!": {"dpo-cache!": {"name!": ("dpo-cache",)}},
}


def filled(text: str, variables: dict[str, str]) -> str:
    """`${NAME:-default}` as compose replaces it, from the inside out."""
    pattern = re.compile(r"\$\{(\w+)(?::-([^${}]*))?\}")
    while pattern.search(text):
        text = pattern.sub(lambda match: variables.get(match[1]) or match[2] or "", text)
    return text


def service(name: str, **variables: str) -> dict[str, Any]:
    return yaml.safe_load(filled(COMPOSE.read_text(encoding="utf-8"), variables))["services"][name]


def options(call: str) -> dict[str, list[str]]:
    """Options of `docker run` with their values, and the words after the image as `command`."""
    words = shlex.split(call)[2:]
    found: dict[str, list[str]] = {}
    while words[0].startswith("--"):
        name = words.pop(0)
        values = [] if name in ("--rm", "--init") else [words.pop(0)]
        found.setdefault(name, []).extend(values)
    return found | {"image": [words[0]], "command": words[1:]}


def test_fields_of_the_compose_file() -> None:
    text = COMPOSE.read_text(encoding="utf-8")
    whole = yaml.safe_load(text)
    whole["x-common"] = {}
    shape = WHOLE | {"x-common!": {}}
    assert problems(whole, shape, "compose") == []
    assert "It has not run with an engine yet." in " ".join(text.replace("\n#", " ").split())
    whole["services"]["train"]["shm-size"] = whole["services"]["train"].pop("shm_size")
    assert len(problems(whole, shape, "compose")) == 2
    # Only by its own profile does either start.
    assert (service("train")["profiles"], service("train-cpu")["profiles"]) == (["gpu"], ["cpu"])


@pytest.mark.parametrize(("name", "gpus"), [("train", "all"), ("train-cpu", "none")])
def test_compose_agrees_with_the_script(machine: Path, name: str, gpus: str) -> None:
    script = options(container(machine, GPUS=gpus))
    composed = service(name, PWD=str(machine))
    assert composed["image"] == script["image"][0]
    assert composed["init"] and "--init" in script
    assert script["--ulimit"] == [f"memlock={composed['ulimits']['memlock']}"]
    assert [composed["shm_size"]] == script["--shm-size"]
    assert composed["stop_grace_period"] == f"{script['--stop-timeout'][0]}s"
    assert composed["volumes"] == [*script["--volume"], f"{machine}:/data:ro"]
    assert [composed["working_dir"]] == script["--workdir"]
    assert ("deploy" in composed) == (script.get("--gpus") == ["all"])
    launched = [*composed["command"][:2], "run.yaml", "loss.beta=0.2", "--gpus", "2", *composed["command"][3:]]
    assert launched == script["command"]
    keys = dict.fromkeys(composed["environment"], "x")
    assert options(container(machine, **keys))["--env"] == composed["environment"]


@pytest.mark.parametrize(
    ("variable", "value", "key", "part"),
    [
        ("IMAGE", "other:1", "image", "other:1"),
        ("CONTAINER_ID", "7:8", "user", "7:8"),
        ("SHM_SIZE", "64g", "shm_size", "64g"),
        ("CACHE", "/big/cache", "volumes", "/big/cache:/cache"),
        ("WORK", "/runs", "volumes", "/runs:/work"),
        ("DATA", "/pairs", "volumes", "/pairs:/data:ro"),
        ("CONFIG", "other.yaml", "command", "other.yaml"),
    ],
)
@pytest.mark.parametrize("name", ["train", "train-cpu"])
def test_variables_of_the_compose_file(name: str, variable: str, value: str, key: str, part: str) -> None:
    before, after = service(name, PWD="/here"), service(name, PWD="/here", **{variable: value})
    assert {one for one in after if after[one] != before[one]} == {key}
    assert part in after[key] and part not in before[key]


def test_compose_runs_as_the_user_of_the_images() -> None:
    for name in ("Dockerfile", "Dockerfile.cpu"):
        (user,) = re.findall(r"^USER (\d+)$", (COMPOSE.parent / name).read_text(encoding="utf-8"), re.MULTILINE)
        assert service("train")["user"] == user != "0"


# ---- Slurm

RUNS = FINISHES + 'while [ "${1#--}" != "$1" ]; do echo "srun:$1"; shift; done; "$@"'
APPTAINER = """
echo "apptainer:$*"
while [ "${1#*.sif}" = "$1" ]; do shift; done
shift
exec "$@"
"""
SHOWS = 'echo "in:$PATH:$HOME:$HF_HOME:$DPO_DIST_CACHE:${PYTHONPATH-unset}:$PWD"; echo "torchrun:$*"'


@pytest.fixture
def cluster(machine: Path) -> Path:
    """Stand-ins that run what they are given; the submit folder has the scripts, as a checkout has."""
    for name, does in (("apptainer", APPTAINER), ("torchrun", SHOWS)):
        (machine / "bin" / name).write_text(f"#!/bin/bash\n{does}\n")
        (machine / "bin" / name).chmod(0o755)
    (machine / "launch").symlink_to(REPOSITORY / "launch")
    return machine


def lines(said: str, head: str) -> list[str]:
    return [line.removeprefix(head) for line in said.splitlines() if line.startswith(head)]


def binds(cluster: Path) -> str:
    """The cache, the submit folder, and where its link leads to."""
    return f"{cluster}/dpo-cache:/cache,{cluster}:{cluster},{REPOSITORY}/launch:{REPOSITORY}/launch"


def test_without_a_container(cluster: Path) -> None:
    code, said, _ = attempt(cluster, RUNS, PYTHONPATH="/host", HOME="/home/me", HF_HOME="/hub", DPO_DIST_CACHE="/c")
    assert code == 0 and lines(said, "srun:")[3:] == ["--kill-on-bad-exit=1", "--wait=60"], said
    path = f"{cluster}/bin:{os.environ['PATH']}"
    assert lines(said, "in:") == [f"{path}:/home/me:/hub:/c:/host:{cluster}"]
    assert not (cluster / "dpo-cache").exists() and not lines(said, "apptainer:")


def test_pyxis(cluster: Path) -> None:
    plain = lines(attempt(cluster, RUNS)[1], "torchrun:")
    code, said, _ = attempt(cluster, RUNS, CONTAINER_IMAGE="/images/dpo.sqsh", PYTHONPATH="/host", HF_HOME="/hub")
    assert code == 0 and lines(said, "srun:")[5:] == [
        "--container-image=/images/dpo.sqsh",
        f"--container-mounts={binds(cluster)}",
        f"--container-workdir={cluster}",
    ], said
    assert (cluster / "dpo-cache").is_dir()
    # The same command as without; its environment is the container's.
    assert lines(said, "torchrun:") == plain
    (inside,) = lines(said, "in:")
    assert inside.startswith(f"/opt/dpo_dist/bin:{cluster}/bin:")
    assert inside.endswith(f":/cache:/cache/huggingface:/cache/dpo_dist:unset:{cluster}")


def test_apptainer(cluster: Path) -> None:
    plain = lines(attempt(cluster, RUNS)[1], "torchrun:")
    code, said, _ = attempt(cluster, RUNS, APPTAINER_IMAGE="/images/dpo.sif", PYTHONPATH="/host")
    assert code == 0 and lines(said, "srun:")[3:] == ["--kill-on-bad-exit=1", "--wait=60"]
    (call,) = lines(said, "apptainer:")
    assert call.startswith(f"exec --nv --bind {binds(cluster)} --pwd {cluster} /images/dpo.sif bash -c"), said
    assert lines(said, "torchrun:") == plain
    assert lines(said, "in:")[0].endswith(f":/cache:/cache/huggingface:/cache/dpo_dist:unset:{cluster}")


def test_what_lies_elsewhere_is_mounted(cluster: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("elsewhere")
    (other / "setup").write_text("export DPO_DIST_CACHE=/mine\n")
    more = {"CACHE": str(other / "cache"), "MOUNTS": "/data:/data:ro /models:/models", "SETUP": str(other / "setup")}
    more |= {"LAUNCH_FOLDER": str(REPOSITORY / "launch"), "CONTAINER_IMAGE": "hub#dpo:1"}
    config = tmp_path_factory.mktemp("configs") / "run.yaml"
    code, said, _ = attempt(cluster, RUNS, config=config, **more)
    assert code == 0 and lines(said, "srun:--container-mounts=") == [
        f"{other}/cache:/cache,{cluster}:{cluster},{REPOSITORY}/launch:{REPOSITORY}/launch,"
        f"{config.parent}:{config.parent},{other}/setup:{other}/setup,/data:/data:ro,/models:/models"
    ], said
    assert (other / "cache").is_dir() and not (cluster / "dpo-cache").exists()
    assert ":/mine:" in lines(said, "in:")[0]  # SETUP has the last word


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({"CONTAINER_IMAGE": "a", "APPTAINER_IMAGE": "b"}, "CONTAINER_IMAGE and APPTAINER_IMAGE are both set"),
        ({"CONTAINER_IMAGE": "a", "MOUNTS": "/a,b:/c"}, "/a,b:/c cannot be mounted: a path with a comma or a space"),
    ],
)
def test_what_is_refused(cluster: Path, variables: dict[str, str], problem: str) -> None:
    code, said, calls = attempt(cluster, RUNS, **variables)
    assert code == 2 and f"error: {problem}" in said and not any(call.startswith("srun") for call in calls)


def test_the_run_folder_is_made_and_mounted(cluster: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What does not exist cannot be mounted."""
    submit = tmp_path_factory.mktemp("submit")
    (submit / "launch").symlink_to(REPOSITORY / "launch")
    (cluster / "out").rmdir()
    code, said, _ = attempt(cluster, 'test -d "$OUT" && ' + RUNS, CONTAINER_IMAGE="a", SLURM_SUBMIT_DIR=submit)
    assert code == 0 and f",{submit}:{submit},{cluster}/out:{cluster}/out," in said, said
