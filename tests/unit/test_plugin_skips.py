"""Skips are listed by reason, and a reason that nobody allowed fails the run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run_pytest(tmp_path: Path):
    """Run pytest with the plugin on a file of the given text."""

    def run(text: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "test_sample.py").write_text(text)
        command = [sys.executable, "-m", "pytest", "-c", os.devnull, "-p", "tests.plugin_skips", tmp_path]
        environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    return run


@pytest.mark.parametrize(
    "text",
    [
        "import pytest\ndef test_a(): pytest.skip('too hard')",
        "import pytest\n@pytest.mark.skipif(True, reason='too hard')\ndef test_a(): ...",
        "import pytest\npytest.skip('too hard', allow_module_level=True)\ndef test_a(): ...",
    ],
)
def test_unlisted_reason_fails_the_run(run_pytest, text: str) -> None:
    result = run_pytest(f"{text}\ndef test_b(): ...")
    assert "NOT ALLOWED  too hard" in result.stdout
    assert result.returncode != 0


def test_listed_reason_is_printed_and_passes(run_pytest) -> None:
    result = run_pytest("import pytest\ndef test_a(): pytest.skip('needs ../shared/data')\ndef test_b(): ...")
    assert result.returncode == 0
    assert "    1  needs ../shared/data\n" in result.stdout
    assert "NOT ALLOWED" not in result.stdout


def test_expected_failures_are_not_skips(run_pytest) -> None:
    result = run_pytest("import pytest\n@pytest.mark.xfail(reason='known')\ndef test_a(): assert False")
    assert result.returncode == 0
    assert "skipped tests by reason" not in result.stdout
