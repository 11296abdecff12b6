"""The files for clusters and clouds, held to the schemas of those who read them.

Those for Kubernetes are read by the API's own models: what these do not know would be lost on the way through them.
That for SkyPilot is read by SkyPilot.
"""

import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubeflow_trainer_api import models
from lightkube.models.networking_v1 import NetworkPolicy

from tests.launching import REPOSITORY

MODELS: dict[str, Any] = {
    "JobSet": models.JobsetV1alpha2JobSet,
    "TrainJob": models.TrainerV1alpha1TrainJob,
    "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
    "NetworkPolicy": NetworkPolicy,
}
FILES = {"jobset.yaml": ["JobSet", "NetworkPolicy"], "trainjob.yaml": ["TrainingRuntime", "TrainJob", "NetworkPolicy"]}


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((REPOSITORY / "launch/kubernetes" / name).read_text(encoding="utf-8")))


def lost(written: Any, read: Any, place: str = "") -> Iterator[str]:
    """Where what was read differs from what is written."""
    if isinstance(written, dict) and isinstance(read, dict):
        for key, value in written.items():
            yield from lost(value, read[key], f"{place}.{key}") if key in read else [f"{place}.{key}"]
    elif isinstance(written, list) and isinstance(read, list) and len(written) == len(read):
        for index, (mine, theirs) in enumerate(zip(written, read, strict=True)):
            yield from lost(mine, theirs, f"{place}.{index}")
    elif written != read:
        yield place


def faults(document: dict[str, Any]) -> list[str]:
    return list(lost(document, MODELS[document["kind"]].from_dict(document).to_dict()))


@pytest.mark.parametrize("name", FILES)
def test_every_field_is_known(name: str) -> None:
    found = documents(name)
    assert [document["kind"] for document in found] == FILES[name]
    assert [faults(document) for document in found] == [[] for _ in found]


def test_planted_faults() -> None:
    (job_set, policy) = documents("jobset.yaml")
    for path, key in (((), "spek"), (("spec",), "replicatedJob"), (("spec", "failurePolicy"), "maxRestart")):
        broken = copy.deepcopy(job_set)
        place = broken
        for step in path:
            place = place[step]
        place[key] = 3
        assert faults(broken) == [f".{'.'.join((*path, key))}"]
    broken = copy.deepcopy(job_set)
    broken["spec"]["failurePolicy"]["maxRestarts"] = "many"
    with pytest.raises(ValueError, match="maxRestarts"):
        faults(broken)
    selector = policy["spec"]["ingress"][0]["from"][0]["podSelector"]
    selector["matchLabel"] = selector.pop("matchLabels")
    assert faults(policy) == [".spec.ingress.0.from.0.podSelector.matchLabel"]
    policy["spec"]["policyTypes"] = "Ingress"
    with pytest.raises(ValueError, match="policyTypes"):
        faults(policy)


# ---- SkyPilot: its dependencies exclude some of ours, so it has an environment of its own

SKYPILOT = "skypilot==0.14.1"
READS = """
import sys
import jsonschema, sky, yaml
from sky.utils.schemas import get_task_schema

task = yaml.safe_load(open(sys.argv[1]))
jsonschema.validate(task, get_task_schema())
try:
    jsonschema.validate(task | {"num_node": 2}, get_task_schema())
except jsonschema.ValidationError as error:
    print(error.message)
read = sky.Task.from_yaml(sys.argv[1])
(resources,) = read.resources
print(read.num_nodes, resources.use_spot, resources.accelerators, list(read.envs))
"""


@pytest.fixture
def skypilot(tmp_path: Path) -> Path:
    """The Python of an environment with SkyPilot."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv/bin/python"
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", SKYPILOT]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    if done.returncode and "No matching distribution found" in done.stderr:
        pytest.skip(f"needs a package index with {SKYPILOT}")
    assert done.returncode == 0, done.stderr
    return python


@pytest.mark.thorough
@pytest.mark.timeout(600)
def test_skypilot_reads_its_file(skypilot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    done = subprocess.run(
        [skypilot, "-c", READS, REPOSITORY / "launch/skypilot.yaml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    refused, read = done.stdout.splitlines()
    assert "num_node" in refused
    assert read == "2 True {'H100': 8} ['CONFIG', 'OUT', 'DPO_DIST_CACHE']"
