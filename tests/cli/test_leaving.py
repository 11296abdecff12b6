"""How a rank ends: everything that was printed or registered for the end is there, and nothing is taken apart."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launching import environment

PROGRAM = """
import atexit, sys, threading, time
from concurrent.futures import ThreadPoolExecutor

class Kept:
    def __del__(self):
        print("taken apart", file=sys.stderr)

kept = Kept()
kept.itself = kept  # a circle, as DeepSpeed's
atexit.register(lambda: print("last words", file=sys.stderr))
threading.Thread(target=lambda: (time.sleep(2), print("a thread's", file=sys.stderr))).start()
pool = ThreadPoolExecutor(1)  # kept by a library, as torch.compile does: its thread waits for work
pool.submit(int).result()
sys.argv = ["dpo-dist", *sys.argv[1:]]
from dpo_dist.cli import main
main()
"""


def run(folder: Path, *arguments: str, rank: str | None) -> subprocess.CompletedProcess[str]:
    variables = environment({} if rank is None else {"RANK": rank})
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize(("arguments", "exit_code"), [(("schema",), 0), (("train", "nowhere.yaml"), 2), (("x",), 2)])
def test_a_rank_says_all_and_is_not_taken_apart(tmp_path: Path, arguments: tuple[str, ...], exit_code: int) -> None:
    ended = run(tmp_path, *arguments, rank="0")
    assert ended.returncode == exit_code
    *before, last = ended.stderr.splitlines()
    assert "a thread's" in before
    assert last == "last words"
    assert "taken apart" not in ended.stderr
    if exit_code == 0:
        assert len(ended.stdout) > 10_000
        json.loads(ended.stdout)


def test_a_process_that_is_no_rank_ends_as_python_does(tmp_path: Path) -> None:
    ended = run(tmp_path, "schema", rank=None)
    assert ended.returncode == 0
    assert ended.stderr.splitlines() == ["a thread's", "last words", "taken apart"]
