"""A wheel, installed away from the repository, works from any folder: its configurations travel inside it."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built offline, by the build backend that the test extra installs."""
    out = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        out,
        ROOT,
    ]
    subprocess.run(command, check=True)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def scripts(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts of another environment that holds the wheel, and sees this one's packages for everything else."""
    folder = tmp_path_factory.mktemp("elsewhere") / "venv"
    venv.create(folder, with_pip=False)
    site_packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
    # A path added this way has its own .pth files ignored, so the editable installation of the repository is not seen.
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    command = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--quiet"]
    subprocess.run([*command, "--no-deps", "--no-index", "--ignore-installed", wheel], check=True)
    return folder / "bin"


def _run(command: list[str | Path], folder: Path) -> str:
    """Standard output of a command run in `folder`, without the repository on its path."""
    environment = {key: value for key, value in os.environ.items() if key not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_wheel_holds_the_package_and_the_shipped_files_only(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = [
        path for folder in ("configs", "deepspeed_configs") for path in (ROOT / folder).rglob("*") if path.is_file()
    ]
    assert {f"dpo_dist/{path.relative_to(ROOT).as_posix()}" for path in shipped} <= names
    assert {"dpo_dist/py.typed", "dpo_dist/cli/__init__.py"} <= names
    assert {name.split("/")[0] for name in names} == {
        "dpo_dist",
        next(n for n in names if n.endswith("METADATA")).split("/")[0],
    }
    assert not [name for name in names if "__pycache__" in name]


def test_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = archive.read(name).decode()
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert "\nRequires-Python: >=3.11\n" in metadata
    assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())


def test_command_line_works_from_any_folder(scripts: Path, tmp_path: Path) -> None:
    where = _run(
        [scripts / "python", "-c", "import dpo_dist; print(dpo_dist.__version__, dpo_dist.__file__)"], tmp_path
    )
    version, package = where.split()
    assert Path(package).is_relative_to(scripts.parent)
    assert version in _run([scripts / "dpo-dist", "--version"], tmp_path)
    assert "train" in _run([scripts / "python", "-m", "dpo_dist", "--help"], tmp_path)
    schema = json.loads(_run([scripts / "dpo-dist", "schema"], tmp_path))
    assert schema == json.loads((ROOT / "configs" / "schema.json").read_text(encoding="utf-8"))


def test_shipped_configuration_is_found_in_the_wheel(scripts: Path, tmp_path: Path) -> None:
    """By its name alone: the config, its data and the DeepSpeed file it names all lie inside the installed package."""
    code = "from dpo_dist.config.files import package_file as f; print(f('configs', 'smollm2_demo.yaml'))"
    config = Path(_run([scripts / "python", "-c", code], tmp_path).strip())
    assert config.is_relative_to(scripts.parent)
    _run([scripts / "dpo-dist", "check", "smollm2_demo"], tmp_path)
    assert list(tmp_path.iterdir()) == []
