"""Runs in odd surroundings: another language setting, a strict umask."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.golden.trajectories import FOLDER
from tests.launching import environment


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({"LC_ALL": "C"}, "läuft"),
        # Python itself then reads and writes ASCII where nobody says otherwise.
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "run"),
    ],
)
def test_another_language_setting_and_a_strict_umask(tmp_path: Path, variables: dict[str, str], name: str) -> None:
    (tmp_path / f"{name}.jsonl").write_bytes((FOLDER / "pairs.jsonl").read_bytes())
    (tmp_path / "run.yaml").write_text(
        f"# Müßiggang\nmodel: {{model_name_or_path: {FOLDER / 'tiny_policy'}, dtype: float32}}\n"
        f"data: {{train: [{{path: {name}.jsonl, limit: 4}}]}}\n"
        f"train: {{output_dir: {name}, examples_per_step: 2, max_steps: 1}}\n"
        "parallel: {deepspeed: zero0_cpu}\n",
        encoding="utf-8",
    )
    done = subprocess.run(
        ["sh", "-c", 'umask 077; exec "$@"', "sh", sys.executable, "-m", "dpo_dist", "train", "run.yaml"],
        cwd=tmp_path,
        env={**environment({"DPO_DIST_CACHE": str(tmp_path / "cache")}), **variables},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert b"Traceback" not in done.stderr
    assert (tmp_path / name / "model" / "model.safetensors").is_file()
    assert not [path for path in (tmp_path / name).rglob("*") if os.stat(path).st_mode & 0o077]
