"""The Kubernetes files, read by the API's own models: what those do not know would be lost on the way through them."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from kubeflow_trainer_api import models

from tests.launching import REPOSITORY

MODELS: dict[str, Any] = {
    "JobSet": models.JobsetV1alpha2JobSet,
    "TrainJob": models.TrainerV1alpha1TrainJob,
    "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
}
FILES = {"jobset.yaml": ["JobSet"], "trainjob.yaml": ["TrainingRuntime", "TrainJob"]}


def documents(name: str) -> list[dict[str, Any]]:
    """Those of a file whose kind has a model: its jobs, and not the network policy."""
    text = (REPOSITORY / "launch/kubernetes" / name).read_text(encoding="utf-8")
    return [document for document in yaml.safe_load_all(text) if document["kind"] in MODELS]


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
    (job_set,) = documents("jobset.yaml")
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
