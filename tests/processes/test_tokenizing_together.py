"""Processes that tokenise the same data at once, or are killed while they do."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpo_dist.config import DataConfig
from dpo_dist.tokenization import TokenizerSpec, prepare_dataset
from tests.launching import REPOSITORY
from tests.unit.test_tokenization import save_tokenizer, strings, write

PREPARE = """
import logging, sys
from pathlib import Path
from dpo_dist.config import DataConfig, DataSource
from dpo_dist.tokenization import TokenizerSpec, prepare_dataset
logging.basicConfig(level=logging.INFO, stream=sys.stdout)
path, tokenizer, cache = sys.argv[1:]
source = DataSource(path=path)
dataset = prepare_dataset([source], DataConfig(train=[source]), TokenizerSpec(tokenizer), Path(cache))
print("fingerprint", dataset.fingerprint, len(dataset))
"""


@pytest.fixture
def spec(tmp_path: Path) -> TokenizerSpec:
    return save_tokenizer(tmp_path / "tokenizer")


def start(tmp_path: Path, spec: TokenizerSpec) -> subprocess.Popen[str]:
    arguments = [str(tmp_path / "pairs.jsonl"), spec.path, str(tmp_path / "cache")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PREPARE, *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_of_three_processes_one_tokenises(tmp_path: Path, spec: TokenizerSpec) -> None:
    write(tmp_path / "pairs.jsonl", strings(4_000))
    processes = [start(tmp_path, spec) for _ in range(3)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sum("tokenised 4,000 examples" in output for output in outputs) == 1
    assert len({re.findall("fingerprint .*", output)[0] for output in outputs}) == 1
    assert len(list((tmp_path / "cache").glob("*/summary.json"))) == 1


def test_a_kill_while_writing_leaves_nothing_that_is_taken_for_whole(tmp_path: Path, spec: TokenizerSpec) -> None:
    source = write(tmp_path / "pairs.jsonl", strings(15_000))
    process = start(tmp_path, spec)
    deadline = time.monotonic() + 60
    while not any(file.stat().st_size > 20_000 for file in (tmp_path / "cache").glob(".*/examples.arrow")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    assert list((tmp_path / "cache").glob(".*")) and not list((tmp_path / "cache").glob("[!.]*/"))
    dataset = prepare_dataset([source], DataConfig(train=[source]), spec, tmp_path / "cache")
    assert len(dataset) == 15_000 and dataset.source_of(-1).endswith(":15000")
    assert not list((tmp_path / "cache").glob(".*"))
