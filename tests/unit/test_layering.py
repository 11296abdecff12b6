"""The shape of the code: layers, sizes, and where things may stand. See CONTRIBUTING.md for the reasons."""

import ast
import itertools
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "dpo_dist"
SOURCES = sorted(PACKAGE.rglob("*.py"))
MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 60
MAX_TRAIN_LINES = 120
READS_ENVIRONMENT = ("cli/", "distributed/groups.py", "distributed/meeting.py")


def _name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
    return {_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}


def _calls_outside_safe_yaml(tree: ast.Module) -> list[int]:
    """Lines of `yaml.load(...)` calls; a class derived from SafeLoader is named ...SafeLoader and passed as Loader=."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"yaml.load", "yaml.load_all"}:
            loaders = [ast.unparse(argument) for argument in node.args[1:]]
            loaders += [ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg == "Loader"]
            if not loaders or not _is_safe_loader(tree, loaders[0]):
                lines.append(node.lineno)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in {"yaml.unsafe_load", "yaml.full_load"}:
            lines.append(node.lineno)
    return lines


def _is_safe_loader(tree: ast.Module, loader: str) -> bool:
    classes = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    if loader in classes:
        return any(_is_safe_loader(tree, ast.unparse(base)) for base in classes[loader].bases)
    return loader in {"yaml.SafeLoader", "yaml.CSafeLoader", "SafeLoader", "CSafeLoader"}


def _environment_reads(tree: ast.Module) -> list[int]:
    lines = [
        node.lineno
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and ast.unparse(node) in {"os.environ", "os.environb", "os.getenv"})
        or (
            isinstance(node, ast.ImportFrom)
            and node.module == "os"
            and {a.name for a in node.names} & {"environ", "getenv"}
        )
    ]
    return lines


def _trusts_remote_code(tree: ast.Module) -> list[int]:
    return [
        node.value.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword)
        and node.arg == "trust_remote_code"
        and isinstance(node.value, ast.Constant)
        and node.value.value is True
    ]


def test_layers() -> None:
    """import-linter: a file imports only from below, and every file is in the list."""
    command = shutil.which("lint-imports", path=str(Path(sys.executable).parent)) or "lint-imports"
    result = subprocess.run([command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_files_are_short() -> None:
    lengths = {_name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_FILE_LINES} == {}


def test_functions_are_short(trees: dict[str, ast.Module]) -> None:
    too_long = {}
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                limit = MAX_TRAIN_LINES if (name, node.name) == ("trainer.py", "train") else MAX_FUNCTION_LINES
                if length > limit:
                    too_long[f"{name}:{node.name}"] = length
    assert too_long == {}


def test_first_line_of_every_file_says_what_it_is(trees: dict[str, ast.Module]) -> None:
    assert [name for name, tree in trees.items() if not ast.get_docstring(tree)] == []


def test_environment_is_read_in_two_files_only(trees: dict[str, ast.Module]) -> None:
    reads = {name: _environment_reads(tree) for name, tree in trees.items() if not name.startswith(READS_ENVIRONMENT)}
    assert {name: lines for name, lines in reads.items() if lines} == {}


def test_no_code_of_a_model_or_a_yaml_file_is_run_unasked(trees: dict[str, ast.Module]) -> None:
    found = {name: _trusts_remote_code(tree) + _calls_outside_safe_yaml(tree) for name, tree in trees.items()}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    ("package", "places"),
    [
        ("deepspeed", {"engine", "model/slices.py"}),  # docs/decisions/0007 and 0011
        ("peft", {"adapters", "model/adapted.py"}),  # docs/decisions/0016; the second only for type checkers
        ("datasets", {"data/hub.py", "data/sources.py"}),  # the same
    ],
)
def test_a_package_is_known_where_the_decision_records_say(
    package: str, places: set[str], trees: dict[str, ast.Module]
) -> None:
    importers = set()
    for name, tree in trees.items():
        for node in ast.walk(tree):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(module.split(".")[0] == package for module in modules):
                importers.add(folder if (folder := name.split("/")[0]) in places else name)
    assert importers == places


def _imports_at_the_top(tree: ast.Module) -> set[str]:
    """Modules that are imported with the file, and not for type checkers only."""
    nodes = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}


def test_what_not_every_run_uses_is_not_imported_with_a_file(trees: dict[str, ast.Module]) -> None:
    """tests/cli/test_imports.py looks at whole processes; here the file is named."""
    lazy = {"dpo_dist.adapters": "adapters/", "dpo_dist.data.hub": "data/hub.py"}
    eager = {
        (name, module)
        for name, tree in trees.items()
        for module in _imports_at_the_top(tree)
        for root, home in lazy.items()
        if (module == root or module.startswith(f"{root}.")) and not name.startswith(home)
    }
    assert eager == set()


def test_every_imported_package_is_declared(trees: dict[str, ast.Module]) -> None:
    """What is imported must not be there by the luck of another package's dependencies."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    declared = {_canonical(re.split(r"[\[<>=!~ ]", requirement)[0]) for requirement in requirements}
    # Not installed here, and one package in two parts.
    distributions = packages_distributions() | {"mlflow": ["mlflow-skinny"], "pydantic_core": ["pydantic"]}
    undeclared = set()
    for tree in trees.values():
        for node in ast.walk(tree):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for root in {module.split(".")[0] for module in modules} - {"dpo_dist"} - sys.stdlib_module_names:
                if not {_canonical(name) for name in distributions.get(root, [root])} & declared:
                    undeclared.add(root)
    assert undeclared == set()


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_no_path_of_one_machine() -> None:
    """Files under version control name no absolute path of the machine they were written on."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listed.returncode == 0:
        paths = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    else:  # an unpacked source archive
        paths = [path for path in ROOT.rglob("*") if not {".venv", ".git", "runs"} & set(path.relative_to(ROOT).parts)]
    pattern = re.compile(rb"(?<![\w.])/(?:work|root)/")
    assert [str(path) for path in paths if path.is_file() and pattern.search(path.read_bytes())] == []


# ---- the checks themselves can fail


@pytest.mark.parametrize(
    ("check", "code"),
    [
        (_environment_reads, "import os\nos.environ['A']"),
        (_environment_reads, "from os import getenv"),
        (_trusts_remote_code, "f(trust_remote_code=True)"),
        (_calls_outside_safe_yaml, "yaml.load(text)"),
        (_calls_outside_safe_yaml, "yaml.load(text, Loader=yaml.Loader)"),
        (_calls_outside_safe_yaml, "class L(yaml.FullLoader): ...\nyaml.load(text, L)"),
        (_calls_outside_safe_yaml, "yaml.unsafe_load(text)"),
    ],
)
def test_a_violation_is_found(check, code: str) -> None:
    assert check(ast.parse(code))


@pytest.mark.parametrize(
    ("check", "code"),
    [
        (_environment_reads, "environ = config.environ"),
        (_trusts_remote_code, "f(trust_remote_code=config.trust_remote_code)"),
        (_calls_outside_safe_yaml, "class L(yaml.SafeLoader): ...\nyaml.load(text, Loader=L)"),
    ],
)
def test_what_is_allowed_is_not_reported(check, code: str) -> None:
    assert not check(ast.parse(code))
