"""launch/container.sh, the files for Kubernetes and SkyPilot: fields that exist, no secrets, and torchrun's words.

None of them runs here. The fields are held to shapes below, which list what the files use as the projects document it;
every check is also given a planted fault. What the files run is run, with stand-ins, up to torchrun's words.
"""

import copy
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser
from typer.testing import CliRunner

from dpo_dist.cli import app
from tests.cli.test_launch_files import LAUNCH, machine, run
from tests.cli.test_launching import folder

__all__ = ["folder", "machine"]  # fixtures

# ---- fields: a mapping has these keys (`!`: always), a list holds these, a tuple is one of these, a type is itself

QUANTITIES = {"nvidia.com/gpu": str, "cpu": str, "memory": str}
SOURCE = {"fieldRef": {"fieldPath!": str}, "secretKeyRef": {"name!": str, "key!": str, "optional": (True,)}}
ENVIRONMENT = [{"name!": str, "value": str, "valueFrom": SOURCE}]
RESOURCES = {"limits!": QUANTITIES, "requests!": QUANTITIES}
POD = {
    "restartPolicy!": ("Never",),  # JobSet makes new pods
    "terminationGracePeriodSeconds!": int,
    "securityContext!": {
        "runAsNonRoot!": (True,),
        "runAsUser!": int,
        "fsGroup!": int,
        "fsGroupChangePolicy": ("OnRootMismatch",),
    },
    "containers!": [
        {
            "name!": ("node",),  # Kubeflow Trainer looks for this name
            "image!": str,
            "workingDir": str,
            "env": ENVIRONMENT,
            "command": [str],
            "args": [str],
            "resources": RESOURCES,
            "securityContext!": {"allowPrivilegeEscalation!": (False,), "capabilities!": {"drop!": [("ALL",)]}},
            "volumeMounts!": [{"name!": str, "mountPath!": str}],
        }
    ],
    "volumes!": [
        {
            "name!": str,
            "persistentVolumeClaim": {"claimName!": str},
            "emptyDir": {"medium": ("Memory",), "sizeLimit": str},
        }
    ],
}
JOB = {
    "parallelism": int,
    "completions": int,
    "completionMode": ("Indexed",),
    "backoffLimit!": (0,),
    "podFailurePolicy!": {
        "rules!": [
            {
                "action!": ("FailJob",),
                "onExitCodes!": {"containerName!": ("node",), "operator!": ("In",), "values!": [(2,)]},
            }
        ]
    },
    "template!": {"spec!": POD},
}
JOBSET = {
    "failurePolicy!": {
        "maxRestarts!": int,
        "rules!": [{"action!": ("FailJobSet",), "onJobFailureReasons!": [("PodFailurePolicy",)]}],
    },
    "network": {"enableDNSHostnames": (True,), "publishNotReadyAddresses": (True,)},
    "replicatedJobs!": [
        {
            "name!": ("node",),
            "replicas": (1,),
            "template!": {
                "metadata": {"labels!": {"trainer.kubeflow.org/trainjob-ancestor-step!": ("trainer",)}},
                "spec!": JOB,
            },
        }
    ],
}
NAMED = {"name!": str, "labels": {"trainer.kubeflow.org/framework": ("torch",)}}
RANKS = {"matchLabels!": {"jobset.sigs.k8s.io/jobset-name!": str}}
KINDS = {
    "JobSet": ("jobset.x-k8s.io/v1alpha2", JOBSET),
    "TrainingRuntime": (
        "trainer.kubeflow.org/v1alpha1",
        {"mlPolicy!": {"numNodes!": int, "torch!": {}}, "template!": {"spec!": JOBSET}},
    ),
    "TrainJob": (
        "trainer.kubeflow.org/v1alpha1",
        {
            "runtimeRef!": {"apiGroup!": ("trainer.kubeflow.org",), "kind!": ("TrainingRuntime",), "name!": str},
            "trainer!": {
                "numNodes!": int,
                "resourcesPerNode!": RESOURCES,
                "env": ENVIRONMENT,
                "command!": [str],
                "args!": [str],
            },
        },
    ),
    "NetworkPolicy": (
        "networking.k8s.io/v1",
        {"podSelector!": RANKS, "policyTypes!": [("Ingress",)], "ingress!": [{"from!": [{"podSelector!": RANKS}]}]},
    ),
}
SKYPILOT = {
    "name!": str,
    "num_nodes!": int,
    "resources!": {"accelerators!": str, "use_spot": bool, "job_recovery": {"max_restarts_on_errors": int}},
    "workdir!": str,
    "volumes!": {"/shared!": str},
    "envs!": {"CONFIG!": str, "OUT!": str, "DPO_DIST_CACHE": str},
    "setup!": str,
    "run!": str,
}


def problems(value: Any, shape: Any, path: str) -> list[str]:
    """What a file has and its shape has not, or the other way round."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return [f"{path} is no mapping"]
        known = {key.rstrip("!"): inner for key, inner in shape.items()}
        found = [f"{path}.{key[:-1]} is missing" for key in shape if key[-1] == "!" and key[:-1] not in value]
        found += [f"{path}.{key} is not known" for key in value.keys() - known.keys()]
        return found + [
            p for key in value.keys() & known.keys() for p in problems(value[key], known[key], f"{path}.{key}")
        ]
    if isinstance(shape, list):
        if not isinstance(value, list) or not value:
            return [f"{path} is no list"]
        return [p for place, one in enumerate(value) for p in problems(one, shape[0], f"{path}[{place}]")]
    right = value in shape if isinstance(shape, tuple) else type(value) is shape
    return [] if right else [f"{path}={value!r} is not {shape}"]


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((LAUNCH / "kubernetes" / name).read_text(encoding="utf-8")))


def document_problems(document: dict[str, Any]) -> list[str]:
    version, spec = KINDS[document["kind"]]
    whole = {"apiVersion!": (version,), "kind!": str, "metadata!": NAMED, "spec!": spec}
    return problems(document, whole, document["kind"])


def pod(document: dict[str, Any]) -> dict[str, Any]:
    spec = document["spec"] if document["kind"] == "JobSet" else document["spec"]["template"]["spec"]
    return spec["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("jobset.yaml", ["JobSet", "NetworkPolicy"]),
        ("trainjob.yaml", ["TrainingRuntime", "TrainJob", "NetworkPolicy"]),
    ],
)
def test_fields_exist(name: str, kinds: list[str]) -> None:
    found = documents(name)
    assert [document["kind"] for document in found] == kinds
    assert [problem for document in found for problem in document_problems(document)] == []
    # One name holds it all together: the runtime that the job names, the label that JobSet gives its pods.
    assert {document["metadata"]["name"] for document in found} == {"dpo-dist"}
    policy = found[-1]["spec"]
    selected = {policy["podSelector"]["matchLabels"]["jobset.sigs.k8s.io/jobset-name"]}
    selected |= {policy["ingress"][0]["from"][0]["podSelector"]["matchLabels"]["jobset.sigs.k8s.io/jobset-name"]}
    assert selected == {"dpo-dist"}
    spec = pod(found[0])
    assert {mount["name"] for mount in spec["containers"][0]["volumeMounts"]} == {v["name"] for v in spec["volumes"]}
    assert spec["terminationGracePeriodSeconds"] > 600  # the time that a save has


def test_kubeflow_finds_the_trainer() -> None:
    (runtime, job, _) = documents("trainjob.yaml")
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert replicated["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]


def test_the_job_set_says_its_size_once_more_where_it_must() -> None:
    (job, _) = documents("jobset.yaml")
    replicated = job["spec"]["replicatedJobs"][0]["template"]["spec"]
    variables = {v["name"]: v.get("value") for v in pod(job)["containers"][0]["env"]}
    assert replicated["parallelism"] == replicated["completions"] == int(variables["NODES"])
    name = job["metadata"]["name"]
    assert variables["HEAD"] == f"{name}-node-0-0.{name}"


def test_planted_faults() -> None:
    (job, policy) = documents("jobset.yaml")
    for path, change in (
        ("JobSet.spec.replicatedJobs[0].template.spec.backofLimit is not known", {"backofLimit": 0}),
        ("JobSet.spec.replicatedJobs[0].template.spec.parallelism='2' is not", {"parallelism": "2"}),
        (
            "JobSet.spec.replicatedJobs[0].template.spec.podFailurePolicy.rules is no list",
            {"podFailurePolicy": {"rules": 1}},
        ),
    ):
        changed = copy.deepcopy(job)
        changed["spec"]["replicatedJobs"][0]["template"]["spec"] |= change
        assert len(document_problems(changed)) == 1 and document_problems(changed)[0].startswith(path)
    del policy["spec"]["ingress"]
    assert document_problems(policy) == ["NetworkPolicy.spec.ingress is missing"]


@pytest.mark.parametrize("name", ["kubernetes/jobset.yaml", "kubernetes/trainjob.yaml", "skypilot.yaml"])
def test_no_secret_and_no_claim(name: str) -> None:
    """No value that looks like a key; and whoever reads the file learns that it was not tried."""
    text = (LAUNCH / name).read_text(encoding="utf-8")
    assert not re.search(r"\b(hf_|wandb_|ghp_|sk-)[A-Za-z0-9]{8,}|[0-9a-f]{32,}", text)
    assert re.search(r"It has not run on a (cluster|cloud) yet\.", text)


def test_skypilot() -> None:
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text(encoding="utf-8"))
    assert problems(task, SKYPILOT, "task") == []
    assert problems({**task, "num_node": 2}, SKYPILOT, "task") == ["task.num_node is not known"]
    for script in (task["setup"], task["run"]):
        assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


# ---- what they run


def torchrun_words(tmp: Path, script: str, variables: dict[str, str]) -> list[str]:
    """Run a script with a stand-in for dpo-dist; what its arguments make of torchrun's words."""
    (tmp / "bin").mkdir(exist_ok=True)
    for name, does in {"dpo-dist": 'printf "%s\\n" "$@" > "$WORDS"', "getent": "", "activate": ""}.items():
        (tmp / "bin" / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp / "bin" / name).chmod(0o755)
    (tmp / ".venv").mkdir(exist_ok=True)
    if not (tmp / ".venv" / "bin").exists():
        (tmp / ".venv" / "bin").symlink_to(tmp / "bin")
    env = {"PATH": f"{tmp / 'bin'}:{os.environ['PATH']}", "WORDS": str(tmp / "words"), **variables}
    subprocess.run(["bash", "-euc", script], env=env, cwd=tmp, check=True)
    result = CliRunner().invoke(app, [*(tmp / "words").read_text().splitlines(), "--dry-run"])
    assert result.exit_code == 0, result.output
    words = shlex.split(result.stdout)
    return words[next(place for place, word in enumerate(words) if word.endswith("/torchrun")) + 1 :]


def script_words(machine: Path, run_id: str, head: str, processes: str = "1") -> list[str]:
    """What launch/torchrun.sh makes of the same run."""
    variables = {"NNODES": "2", "HEAD": head, "RUN_ID": run_id, "NPROC": processes}
    calls = run(
        machine, "torchrun.sh", "run.yaml", "train.output_dir=runs/first", "checkpoint.resume=auto", **variables
    )[2]
    return calls[-1].split()[1:]


def test_what_a_pod_runs(folder: Path, machine: Path) -> None:
    (job, _) = documents("jobset.yaml")
    container = pod(job)["containers"][0]
    variables = {v["name"]: v["value"] for v in container["env"] if "value" in v} | {"ATTEMPT": "3"}
    assert container["command"] == ["bash", "-euc"]
    words = torchrun_words(folder, container["args"][0], variables)
    assert words == script_words(machine, "dpo_dist.3", "dpo-dist-node-0-0.dpo-dist")


def test_what_a_train_job_runs(folder: Path, machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (runtime, job, _) = documents("trainjob.yaml")
    trainer = job["spec"]["trainer"]
    kubeflow = {"PET_NNODES": "2", "PET_MASTER_ADDR": "dpo-dist-node-0-0.dpo-dist", "PET_MASTER_PORT": "29400"}
    kubeflow |= {"PET_NPROC_PER_NODE": "auto", "PET_NODE_RANK": "1"}
    variables = {v["name"]: v["value"] for v in trainer["env"]} | kubeflow | {"ATTEMPT": "3"}
    assert "ATTEMPT" in {v["name"] for v in pod(runtime)["containers"][0]["env"]}
    assert trainer["command"] == ["bash", "-euc"]
    words = torchrun_words(folder, trainer["args"][0], variables)
    assert words == script_words(machine, "dpo_dist.3", "dpo-dist-node-0-0.dpo-dist")
    # torchrun reads Kubeflow's variables as well; what it is told on its command line counts.
    for name, value in kubeflow.items():
        monkeypatch.setenv(name, value)
    told = get_args_parser().parse_args(words)
    assert (told.nnodes, told.nproc_per_node, told.rdzv_backend) == ("2", "1", "c10d")
    assert told.rdzv_endpoint == "dpo-dist-node-0-0.dpo-dist:29500"


def test_what_skypilot_runs(folder: Path, machine: Path) -> None:
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text(encoding="utf-8"))
    sky = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    sky |= {"SKYPILOT_TASK_ID": "sky-2026_x_1-0"}
    words = torchrun_words(folder, task["run"], task["envs"] | {"OUT": "runs/first"} | sky)
    assert words == script_words(machine, "sky-2026_x_1-0", "10.0.0.1", "8")
    one = torchrun_words(folder, task["run"], task["envs"] | sky | {"SKYPILOT_NUM_NODES": "1"})
    assert "store_type=file" in one


# ---- a container


def container(machine: Path, **variables: str) -> str:
    """The command of the engine; docker where nothing else is said."""
    for name in ("docker", "podman"):
        (machine / "bin" / name).write_text(f'#!/bin/bash\necho "{name} $*" >> "$CALLS/calls"\n')
        (machine / "bin" / name).chmod(0o755)
    unset = dict.fromkeys(("HF_TOKEN", "WANDB_API_KEY", "HF_HUB_OFFLINE"), "")
    code, said, calls = run(machine, "container.sh", "run.yaml", "loss.beta=0.2", "--gpus", "2", **unset | variables)
    assert code == 0, said
    return calls[-1]


def test_a_container(machine: Path) -> None:
    call = container(machine)
    assert call.startswith("docker run --rm --init --ulimit memlock=-1 ")
    assert call.endswith(" dpo-dist:cpu dpo-dist launch run.yaml loss.beta=0.2 --gpus 2 --stop-seconds 600")
    for part in (
        f"--user {os.getuid()}:{os.getgid()}",
        "--stop-timeout 630",
        "--shm-size 16g",
        "--volume dpo-cache:/cache",
        f"--volume {machine}:/work --workdir /work",
    ):
        assert f" {part} " in call
    assert not any(option in call for option in ("--gpus all", "--network", "--tty", "--env"))


@pytest.mark.parametrize(
    ("variables", "part"),
    [
        ({"ENGINE": "podman"}, "--userns keep-id"),
        ({"IMAGE": "other:1"}, "other:1 dpo-dist launch"),
        ({"GPUS": "all"}, "--gpus all"),
        ({"GPUS": "all"}, "dpo-dist:cuda dpo-dist launch"),
        ({"GPUS": "all", "ENGINE": "podman"}, "--device nvidia.com/gpu=all"),
        ({"CACHE": "/big/cache"}, "--volume /big/cache:/cache"),
        ({"MOUNTS": "/data:/data:ro /more:/more"}, "--volume /data:/data:ro --volume /more:/more"),
        ({"SHM_SIZE": "64g"}, "--shm-size 64g"),
        ({"SHM_SIZE": "host"}, "--ipc=host"),
        ({"NETWORK": "host"}, "--network host"),
        ({"CONTAINER_ID": "10001:0"}, "--user 10001:0"),
        ({"STOP_SECONDS": "77"}, "--stop-timeout 107"),
        ({"STOP_SECONDS": "77"}, "--stop-seconds 77"),
        ({"HF_TOKEN": "value"}, "--env HF_TOKEN"),
    ],
)
def test_variables_of_the_container(machine: Path, variables: dict[str, str], part: str) -> None:
    assert f" {part} " not in container(machine)
    call = container(machine, **variables)
    assert f" {part} " in f"{call} " and "value" not in call


def test_a_container_that_shows_gpus(machine: Path) -> None:
    (machine / "bin" / "nvidia-smi").write_text("#!/bin/bash\necho GPU 0: x\n")
    assert " --gpus all " in container(machine) and " dpo-dist:cuda " in container(machine)
    assert "--gpus all" not in container(machine, GPUS="none")


def test_a_container_is_only_shown(machine: Path) -> None:
    container(machine)
    code, said, calls = run(machine, "container.sh", "run.yaml", "a=b c", DRY_RUN="1", ENGINE="docker")
    assert code == 0 and not [call for call in calls if call.startswith("docker")]
    assert shlex.split(said)[-4:] == ["run.yaml", "a=b c", "--stop-seconds", "600"]


def test_no_engine(machine: Path) -> None:
    for name in ("bash", "grep"):
        (machine / "bin" / name).symlink_to(f"/bin/{name}")
    code, said, _ = run(machine, "container.sh", "run.yaml", PATH=str(machine / "bin"))
    assert code == 2 and "neither docker nor podman is installed" in said
