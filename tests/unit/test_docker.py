"""docker/: locks that agree with constraints.txt and each other, and Dockerfiles that take nothing unchecked.

No image is built here. Every check is also given a planted fault, which it must name.
"""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
LOCKS = ("build", "cpu", "cuda", "flash-attn")
DOCKERFILES = {"Dockerfile": {"build", "cuda", "flash-attn"}, "Dockerfile.cpu": {"build", "cpu"}}
ATTENTION = {"flash-attn", "flash-attn-3", "flash-attn-4"}
EXTRAS = ("wandb", "mlflow")

PINNED_IMAGE = re.compile(r"\S+:(?!latest\b)[\w.-]+@(\$\{(\w+_DIGEST)\}|sha256:[0-9a-f]{64})")
SECRET = re.compile(r"token|secret|passw|credential|api_?key|netrc", re.IGNORECASE)


def _read(name: str) -> str:
    return (DOCKER / name).read_text(encoding="utf-8")


def _pins(text: str) -> dict[str, Version]:
    """Package and version of each `name==version` line, in a lock or in constraints.txt."""
    return {canonicalize_name(n): Version(v) for n, v in re.findall(r"^([\w.-]+)==([^\s\\]+)", text, re.MULTILINE)}


def _lock_problems(lock: str, constraints: str) -> list[str]:
    problems = []
    wanted = _pins(constraints)
    for line in lock.replace("\\\n", " ").splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        requirement = re.match(r"([\w.-]+)==(\S+)(?P<hashes>( +--hash=sha256:[0-9a-f]{64})*) *$", line)
        if not requirement:
            problems.append(f"not an exact version with hashes: {line.split(' ')[0]}")
            continue
        if not requirement["hashes"]:
            problems.append(f"no hash: {requirement[1]}")
        pinned = wanted.get(canonicalize_name(requirement[1]))
        # Another build, as 2.13.0+cpu is one of 2.13.0, is no other release.
        if pinned is not None and Version(requirement[2]).public != pinned.public:
            problems.append(f"{requirement[1]} is {requirement[2]}, constraints.txt says {pinned}")
    return problems


def _missing_requirements(lock: str) -> list[str]:
    """What pyproject.toml asks for and the lock does not give."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *(line for extra in EXTRAS for line in project["optional-dependencies"][extra])]
    pins = _pins(lock)
    problems = []
    for requirement in map(Requirement, asked):
        pin = pins.get(canonicalize_name(requirement.name))
        if pin is None or pin not in requirement.specifier:
            problems.append(f"{requirement} is not in the lock")
    return problems


def _cuda_problems(lock: str, dockerfile: str) -> list[str]:
    """One release of CUDA in the image that compiles, the image that runs, and the wheels."""
    pins = _pins(lock)
    if not {"torch", "triton", "cuda-toolkit", "nvidia-cuda-runtime"} <= pins.keys():
        return ["not a lock of torch's CUDA build"]
    release = pins["cuda-toolkit"].release[:2]
    problems = []
    if pins["nvidia-cuda-runtime"].release[:2] != release:
        problems.append("nvidia-cuda-runtime is not of the toolkit's release")
    if pins["torch"].local is not None:
        problems.append("torch is another build than PyPI's")
    for name in pins:
        suffix = re.search(r"-cu(\d+)$", name)
        if suffix and int(suffix[1]) != release[0]:
            problems.append(f"{name} is for another CUDA than {release[0]}")
    tags = re.findall(r"^FROM nvidia/cuda:(\d+)\.(\d+)\.\d+-\w+-(\w+\.\d+)@", dockerfile, re.MULTILINE)
    if len(tags) != 2 or len(set(tags)) != 1 or tuple(map(int, tags[0][:2])) != release:
        problems.append(f"images of {tags} for a lock of {release}")
    return problems


def _cpu_problems(lock: str) -> list[str]:
    pins = _pins(lock)
    problems = [f"{name} has no use on a CPU" for name in pins if name.startswith(("nvidia-", "cuda-", "triton"))]
    if "torch" not in pins or pins["torch"].local != "cpu":
        problems.append("torch is not the CPU build")
    return problems


def _attention_problems(locks: dict[str, str], wanted: set[str]) -> list[str]:
    """The packages overwrite each other's files, so an image holds one at most."""
    found = sorted(name for lock in locks.values() for name in _pins(lock) if name in ATTENTION)
    return [] if found == sorted(wanted) else [f"attention packages {found}, not {sorted(wanted)}"]


def _instructions(dockerfile: str) -> list[tuple[str, str]]:
    lines = [line for line in dockerfile.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in joined.splitlines() if line.strip()]


def _dockerfile_problems(dockerfile: str) -> list[str]:
    instructions = _instructions(dockerfile)
    problems = _base_problems(instructions)
    for instruction, argument in instructions:
        if instruction == "ADD":
            problems.append(f"COPY does all that is needed: ADD {argument}")
        if instruction in {"ARG", "ENV", "RUN"} and SECRET.search(argument):
            problems.append(f"a secret would stay in the image: {instruction} {argument}")
        if instruction == "RUN":
            problems += _run_problems(argument)
    last_stage = dockerfile[dockerfile.rindex("\nFROM ") :]
    user = ["root", *(argument for instruction, argument in _instructions(last_stage) if instruction == "USER")][-1]
    if not re.fullmatch(r"[1-9]\d*", user):
        problems.append(f"runs as {user}, not as a number other than 0")
    return problems


def _base_problems(instructions: list[tuple[str, str]]) -> list[str]:
    """A stage starts from an earlier one, or from an image whose digest is written down or must be given."""
    problems = []
    stages: set[str] = set()
    digests: set[str] = set()
    for instruction, argument in instructions:
        if instruction == "ARG" and "_DIGEST" in argument:
            name, _, default = argument.partition("=")
            digests.add(name)
            if default and not re.fullmatch(r"sha256:[0-9a-f]{64}", default):
                problems.append(f"not a digest: {argument}")
        elif instruction == "FROM":
            image, _, stage = argument.partition(" AS ")
            pinned = PINNED_IMAGE.fullmatch(image)
            if image not in stages and not (pinned and (pinned[2] is None or pinned[2] in digests)):
                problems.append(f"not a tag with a digest: {image}")
            stages.add(stage)
    return problems


def _run_problems(commands: str) -> list[str]:
    problems = [f"fetches past the locks: {commands}"] if re.search(r"\b(curl|wget|git|uv)\b", commands) else []
    for command in re.findall(r"\bpip\d* (?:install|wheel|download)\b[^&;|]*", commands):
        if "--require-hashes" not in command and "--no-index" not in command:
            problems.append(f"takes what no hash covers: {command}")
        if "--no-build-isolation" not in command and "--only-binary :all:" not in command:
            problems.append(f"fetches build requirements that no hash covers: {command}")
    return problems


def _locks_used(dockerfile: str) -> set[str]:
    return set(re.findall(r"-r /opt/locks/([\w-]+)\.txt", dockerfile))


# ---- the files as they are


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_has_the_tested_versions_and_hashes(name: str) -> None:
    lock = _read(f"locks/{name}.txt")
    assert _pins(lock)
    assert _lock_problems(lock, (ROOT / "constraints.txt").read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_a_lock_has_all_that_the_package_needs(name: str) -> None:
    assert _missing_requirements(_read(f"locks/{name}.txt")) == []


def test_the_extras_are_those_that_are_locked() -> None:
    assert tuple(re.findall(r"--extra (\w+)", _read("lock.sh"))) == EXTRAS


def test_cuda_is_one_release_everywhere() -> None:
    assert _cuda_problems(_read("locks/cuda.txt"), _read("Dockerfile")) == []


def test_the_cpu_lock_has_torch_for_cpus_and_nothing_for_gpus() -> None:
    assert _cpu_problems(_read("locks/cpu.txt")) == []


@pytest.mark.parametrize(("name", "wanted"), [("Dockerfile", {"flash-attn"}), ("Dockerfile.cpu", set())])
def test_an_image_has_one_attention_package_at_most(name: str, wanted: set[str]) -> None:
    assert _attention_problems({lock: _read(f"locks/{lock}.txt") for lock in DOCKERFILES[name]}, wanted) == []


def test_flash_attn_is_compiled_in_a_stage_of_its_own() -> None:
    stages = re.split(r"^(?=FROM )", _read("Dockerfile"), flags=re.MULTILINE)
    compiling = [stage for stage in stages if "flash-attn.txt" in stage]
    assert [stage.splitlines()[0] for stage in compiling] == ["FROM packages AS flash-attn"]
    # Otherwise its setup.py downloads a wheel.
    assert "FLASH_ATTENTION_FORCE_BUILD=TRUE pip wheel" in compiling[0]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_a_dockerfile_takes_nothing_unchecked(name: str) -> None:
    assert _dockerfile_problems(_read(name)) == []
    assert _locks_used(_read(name)) == DOCKERFILES[name]


def test_only_what_is_named_goes_into_an_image() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "*"
    named = [line.removeprefix("!/") for line in lines if line.startswith("!")]
    assert {"pyproject.toml", "README.md", "LICENSE", "docker/locks/"} < set(named)
    assert all((ROOT / name).exists() for name in named)
    # What pyproject.toml puts into the wheel must be there to be put.
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {f"{folder}/" for folder in [*wheel["packages"], *wheel["force-include"]]} <= set(named)


# ---- planted faults


def _planted(text: str, old: str, new: str) -> str:
    changed = re.sub(old, new, text, count=1, flags=re.MULTILINE)
    assert changed != text, f"nothing to replace: {old}"
    return changed


HASHES = r"( \\\n    --hash=\S+)+"


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (r"^torch==2\.13\.0", "torch==2.12.0", "torch is 2.12.0, constraints.txt says 2.13.0"),
        (r"^triton==3\.7\.1", "triton==3.7.0", "triton is 3.7.0, constraints.txt says 3.7.1"),
        (rf"^wandb==(\S+){HASHES}", r"wandb==\1", "no hash: wandb"),
        (r"^(wandb==\S+ \\\n +--hash=sha256:)\w+", r"\1abc", "not an exact version with hashes: wandb=="),
        (r"^wandb==", "wandb>=", "not an exact version with hashes: wandb>="),
        (r"\Z", "git+https://example.org/a.git", "not an exact version with hashes: git+https"),
    ],
)
def test_a_fault_in_a_lock_is_seen(old: str, new: str, problem: str) -> None:
    lock = _planted(_read("locks/cuda.txt"), old, new)
    [found] = _lock_problems(lock, (ROOT / "constraints.txt").read_text(encoding="utf-8"))
    assert found.startswith(problem)


def test_a_requirement_that_is_not_locked_is_seen() -> None:
    assert _missing_requirements(_planted(_read("locks/cpu.txt"), r"^jaxtyping==", "other=="))
    assert _missing_requirements(_planted(_read("locks/cpu.txt"), r"^jaxtyping==\S+", "jaxtyping==0.0.1"))


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (r"^nvidia-nccl-cu13==", "nvidia-nccl-cu12==", "nvidia-nccl-cu12 is for another CUDA than 13"),
        (r"^nvidia-cuda-runtime==13\.0", "nvidia-cuda-runtime==13.1", "nvidia-cuda-runtime is not of the toolkit's"),
        (r"^cuda-toolkit==13\.0", "cuda-toolkit==13.1", "images of "),
        (r"^torch==2\.13\.0", "torch==2.13.0+cu126", "torch is another build"),
        (r"^triton==", "not-triton==", "not a lock of torch's CUDA build"),
        (r"nvidia/cuda:13\.0\.3-devel", "nvidia/cuda:12.8.1-devel", "images of "),
        (r"nvidia/cuda:13\.0\.3-base-ubuntu24", "nvidia/cuda:13.0.3-base-ubuntu22", "images of "),
    ],
)
def test_two_releases_of_cuda_are_seen(old: str, new: str, problem: str) -> None:
    separator = "\n-- Dockerfile\n"
    both = _planted(_read("locks/cuda.txt") + separator + _read("Dockerfile"), old, new)
    assert any(found.startswith(problem) for found in _cuda_problems(*both.split(separator)))


@pytest.mark.parametrize(("old", "new"), [(r"\+cpu", ""), (r"^tqdm==", "triton=="), (r"^tqdm", "nvidia-cublas")])
def test_a_gpu_package_in_the_cpu_lock_is_seen(old: str, new: str) -> None:
    assert len(_cpu_problems(_planted(_read("locks/cpu.txt"), old, new))) == 1


@pytest.mark.parametrize("packages", [[], ["flash-attn", "flash-attn-4"], ["flash-attn-4"], ["flash_attn_4"]])
def test_another_number_of_attention_packages_is_seen(packages: list[str]) -> None:
    locks = {"cuda": "".join(f"{package}==1.0\n" for package in packages)}
    assert _attention_problems(locks, {"flash-attn"})


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (r"^USER 10001$", "USER root", "runs as root"),
        (r"^USER 10001$", "USER 0", "runs as 0"),
        (r"^USER 10001$", "", "runs as root"),
        (r"^WORKDIR", "USER root\nWORKDIR", "runs as root"),
        (r" --require-hashes", "", "takes what no hash covers"),
        (r" --no-build-isolation", "", "fetches build requirements"),
        (r" --only-binary :all:", "", "fetches build requirements"),
        (r" --no-index", "", "takes what no hash covers"),
        (r"^(FROM \w+(/\w+)?):[\w.-]+@", r"\1:latest@", "not a tag with a digest"),
        (r"^(FROM \w+(/\w+)?):[\w.-]+@", r"\1@", "not a tag with a digest"),
        (r"^(FROM [^@\s]+)@\S+", r"\1", "not a tag with a digest"),
        (r"^(FROM [^@\s]+)@\S+", r"\1@sha256:0123", "not a tag with a digest"),
        (r"^ARG \w+_DIGEST\n", "", "not a tag with a digest"),
        (r"^(ARG \w+_DIGEST)$", r"\1=13.0.3", "not a digest"),
        (r"^COPY (docker\S+)", r"ADD https://example.org/a.tar /opt/a\nCOPY \1", "COPY does all that is needed"),
        (r"^RUN python3", "RUN curl -O https://example.org/a && python3", "fetches past the locks"),
        (r"^WORKDIR", "ARG HF_TOKEN\nWORKDIR", "a secret would stay"),
        (r"^WORKDIR", "ENV WANDB_API_KEY=abc\nWORKDIR", "a secret would stay"),
        (r"^RUN python3", "RUN --mount=type=secret,id=hub python3", "a secret would stay"),
    ],
)
@pytest.mark.parametrize("name", DOCKERFILES)
def test_a_fault_in_a_dockerfile_is_seen(name: str, old: str, new: str, problem: str) -> None:
    found = _dockerfile_problems(_planted(_read(name), old, new))
    assert any(each.startswith(problem) for each in found)
