"""Two rounds of feedback on this machine, as a user types them: sample, judge, add, train, and all of it once more.

    python -m tests.two_rounds [FOLDER]

FOLDER is new; runs/two_rounds if none is given. The judge is a rule (tests/full_stop_judge.py) in this process. In the
second round `dpo-dist sample` is killed in the middle and begun again: it goes on. docs/feedback.md has the commands
one by one.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.full_stop_judge import verdict
from tests.openai_server import serving
from tests.pages import ROOT

Run = Callable[[Sequence[str], Path], int]
"""Runs `dpo-dist` with these words in a folder; the exit code."""
ROUNDS = (1, 2)


@dataclass(frozen=True)
class Story:
    """What is played; the values are those of the page."""

    folder: Path
    model: str = "demo"
    prompts: Path = ROOT / "configs" / "demo" / "train.jsonl"
    sampling: tuple[str, ...] = ("--limit", "24", "-k", "4", "--max-new-tokens", "40")
    config: Path = ROOT / "configs" / "two_rounds.yaml"
    overrides: tuple[str, ...] = ()
    killed_in: tuple[int, ...] = (2,)
    killed_at: int = 32
    """Completions that are there when `sample` is killed."""


def as_typed(words: Sequence[str], folder: Path) -> int:
    """Print the command, run it, and let it print."""
    print(f"\n$ dpo-dist {shlex.join(words)}", flush=True)
    return subprocess.run(_command(words), cwd=folder, env=_environment(), check=False).returncode


def play(story: Story, judge: str, run: Run = as_typed) -> list[dict[str, Any]]:
    """Both rounds, as they were written down.

    Args:
        story: what is played; its folder is there, and empty.
        judge: address of the judge.
        run: how a command is run.
    """
    model = story.model
    for number in ROUNDS:
        out = f"ranked{number}.jsonl"
        # Another seed: from the same one the model would say much of it once more.
        words = ["sample", os.path.relpath(story.prompts, story.folder), "--model", model, "--out", out]
        words += ["--seed", str(number), *story.sampling, "--judge", judge, "--judge-model", "full-stop"]
        if number in story.killed_in:
            kill_in_the_middle(words, story.folder, story.folder / f"{out}.partial", story.killed_at)
        _must_end_well(run(words, story.folder), words)
        words = ["feedback", "add", out, "--to", "feedback"]
        _must_end_well(run(words, story.folder), words)
        words = ["round", os.path.relpath(story.config, story.folder), *story.overrides, "--reference", "first"]
        code = run(words, story.folder)
        if _written(story, number)["accepted"] is None:
            _must_end_well(code, words)
        model = f"rounds/round-{number:03d}/model"
    return [_written(story, number) for number in ROUNDS]


def kill_in_the_middle(words: Sequence[str], folder: Path, partial: Path, num_completions: int) -> None:
    """Run a command, and kill it without a warning as soon as so many completions are there."""
    print(f"\n$ dpo-dist {shlex.join(words)}", flush=True)
    process = subprocess.Popen(_command(words), cwd=folder, env=_environment())
    while process.poll() is None and _num_completions(partial) < num_completions:
        time.sleep(0.005)
    process.kill()
    if process.wait() != -signal.SIGKILL:
        raise SystemExit(f"it had ended ({process.returncode}) before it could be killed")
    print(f"(killed after {_num_completions(partial)} completions; now the same command again)", flush=True)


def told(rounds: Sequence[dict[str, Any]]) -> list[str]:
    """The held-out accuracies of each round."""
    lines = ["held-out pairs preferred more than by the first model"]
    for one in rounds:
        for verdict_ in one["verdicts"]:
            age = "old" if verdict_["is_old"] else "new"
            before = "" if verdict_["before"] is None else f"{verdict_['before']:.1%} -> "
            lines.append(f"  round {one['number']}, {verdict_['dataset']} ({age}): {before}{verdict_['after']:.1%}")
    return lines


def full_stops(folder: Path) -> str:
    """How many of each round's answers are as the judge likes them: those of the second are of the first's model."""
    found = []
    for number in ROUNDS:
        lines = (folder / f"ranked{number}.jsonl").read_text("utf-8").splitlines()
        answers = [answer[-1]["content"] for line in lines for answer in json.loads(line)["completions"]]
        num_ended = sum(answer.strip().endswith(".") for answer in answers)
        found.append(f"{num_ended} of {len(answers)} in round {number}")
    return f"answers that end with a full stop: {', '.join(found)}"


def _num_completions(partial: Path) -> int:
    """Its first line is the settings."""
    return max(partial.read_bytes().count(b"\n") - 1, 0) if partial.exists() else 0


def _command(words: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "dpo_dist", *words]


def _environment() -> dict[str, str]:
    """That of this process; one process on a CPU may use all cores."""
    return {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))), **os.environ}


def _must_end_well(code: int, words: Sequence[str]) -> None:
    if code:
        raise SystemExit(f"exit code {code} of dpo-dist {shlex.join(words)}")


def _written(story: Story, number: int) -> dict[str, Any]:
    path = story.folder / "rounds" / f"round-{number:03d}.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else {"accepted": None}


if __name__ == "__main__":
    started = time.monotonic()
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/two_rounds").resolve()
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise SystemExit(f"{folder} is there already; give another folder, or remove it") from None
    with serving(verdict) as server:
        ended = play(Story(folder), server.url)
    print("\n" + "\n".join([*told(ended), full_stops(folder)]))
    print(f"{(time.monotonic() - started) / 60:.0f} minutes; all of it lies in {folder}")
