"""Plant every fault in a copy of the repository, run the tests that should fail, and say which one did.

    python -m tests.mutants [NAME ...] [--list] [--jobs 1]

Exit code 1: a fault that no test catches. A test file that can no longer be imported catches nothing.
"""

import argparse
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.mutants import ROOT, Mutant, load

_FAILED = re.compile(r"^(?:FAILED|ERROR) (tests/\S+?::.*?)(?: - .*)?$", re.MULTILINE)


def copy_repository(target: Path) -> None:
    """What git tracks, or would track, as it stands in the working folder."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def run_tests(copy: Path, tests: Iterable[str]) -> subprocess.CompletedProcess[str]:
    """Run tests in a copy, up to the first that fails."""
    # No bytecode: a fault may have the size and the second of the sound file, and Python would take it for that one.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    options = ("-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "-rfE", "--tb=no")
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests], cwd=copy, env=environment, capture_output=True, text=True
    )


def caught_by(mutant: Mutant, copy: Path) -> tuple[str, float]:
    """The first test that fails with the fault, and seconds; empty if none does."""
    sound = (copy / mutant.file).read_bytes()
    started = time.perf_counter()
    mutant.plant(copy)
    try:
        finished = run_tests(copy, mutant.tests)
    finally:
        (copy / mutant.file).write_bytes(sound)
    failed = _FAILED.search(finished.stdout) if finished.returncode == 1 else None
    if failed is None and finished.returncode:
        print(f"{mutant.name}: pytest left with {finished.returncode}\n{finished.stdout[-2000:]}", file=sys.stderr)
    return failed[1] if failed else "", time.perf_counter() - started


def run_all(mutants: list[Mutant], folder: Path, jobs: int) -> int:
    """Print the table; returns how many were not caught."""
    copies: queue.Queue[Path] = queue.Queue()
    for number in range(jobs):
        copy_repository(folder / str(number))
        copies.put(folder / str(number))

    def judge(mutant: Mutant) -> tuple[str, float]:
        copy = copies.get()
        try:
            return caught_by(mutant, copy)
        finally:
            copies.put(copy)

    width, survivors, started = max(len(mutant.name) for mutant in mutants), [], time.perf_counter()
    with ThreadPoolExecutor(jobs) as pool:
        for mutant, (test, seconds) in zip(mutants, pool.map(judge, mutants), strict=True):
            survivors += [] if test else [mutant.name]
            print(f"{mutant.name:{width}}  {seconds:5.0f} s  {test or 'NOT CAUGHT'}", flush=True)
    minutes = (time.perf_counter() - started) / 60
    print(f"{len(mutants) - len(survivors)} of {len(mutants)} caught, in {minutes:.1f} minutes")
    return len(survivors)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="of faults; none: all of them")
    parser.add_argument("--list", action="store_true", help="print the faults and plant none")
    parser.add_argument("--jobs", type=int, default=1, help="copies that are worked in at once")
    arguments = parser.parse_args()
    mutants = load()
    if unknown := set(arguments.names) - {mutant.name for mutant in mutants}:
        parser.error(f"no such fault: {', '.join(sorted(unknown))}; --list names them")
    mutants = [mutant for mutant in mutants if not arguments.names or mutant.name in arguments.names]
    if arguments.list:
        for mutant in mutants:
            print(f"{mutant.name}: {mutant.file}\n  - {mutant.old.strip()}\n  + {mutant.new.strip()}")
        return 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        copy = Path(name, "sound")
        copy_repository(copy)
        started = time.perf_counter()
        sound = run_tests(copy, dict.fromkeys(test for mutant in mutants for test in mutant.tests))
        if sound.returncode:
            print(f"without a fault the tests fail already:\n{sound.stdout[-4000:]}", file=sys.stderr)
            return 1
        print(f"without a fault: all pass, in {(time.perf_counter() - started) / 60:.1f} minutes", flush=True)
        return 1 if run_all(mutants, Path(name), arguments.jobs) else 0


if __name__ == "__main__":
    sys.exit(main())
