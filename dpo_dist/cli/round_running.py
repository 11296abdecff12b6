"""`dpo-dist round`: one round of training on feedback, and whether its model may be the start of the next."""

import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from dpo_dist.cli.launch_options import Where
from dpo_dist.cli.launching import plan_launch
from dpo_dist.config import load_config
from dpo_dist.rounds import Round, Rounds, Verdict

_OWN = (
    *("data.train", "model.model_name_or_path", "model.reference_name_or_path"),
    *("train.output_dir", "checkpoint.resume"),
)


def run_round(
    path: str,
    overrides: Sequence[str],
    reference: Literal["last", "first"],
    max_drop: float,
    where: Where,
    dry_run: bool,
) -> int:
    """Run the next round, or go on with one that was interrupted; the exit code.

    Args:
        path: the configuration, as the user named it.
        overrides: `section.key=value`.
        reference: what a round is compared with.
        max_drop: how much of the pairs of old feedback a round may cost.
        where: on what it is started, as for `launch`.
        dry_run: only print the command.
    Raises:
        ConfigError, DataError: what cannot be done, and the way out.
    """
    rounds = Rounds(load_config(path, overrides))
    one, was_begun = rounds.next(reference)
    given = [text for text in overrides if not _is_own(text)]
    folder = rounds.run_folder(one.number)
    own = [*given, *one.overrides, f"train.output_dir={folder}", "checkpoint.resume=auto"]
    config = load_config(path, own)
    if dry_run:
        print(plan_launch(config, path, own, where))
        return 0
    if not was_begun:
        rounds.write(one)
    begins = "goes on with" if was_begun else "begins"
    files = f"{len(one.versions)} versions of feedback" if len(one.versions) > 1 else "one version of feedback"
    print(f"{begins} round {one.number}: {files}, from {one.model}", file=sys.stderr, flush=True)
    code = _launched([path, *own], where)
    if code:
        print(f"round {one.number} has not ended; the same command goes on with it", file=sys.stderr, flush=True)
        return code
    names = config.data.evaluation_names[len(config.data.evaluation) :]
    verdicts = rounds.judge(one, names)
    accepted = not any(verdict.has_fallen(max_drop) for verdict in verdicts)
    rounds.write(replace(one, accepted=accepted, verdicts=verdicts))
    silent = [name for name in names if name not in {verdict.dataset for verdict in verdicts}]
    print("\n".join(_told(one, verdicts, silent, max_drop, str(folder))))
    return 0 if accepted else 1


def _is_own(override: str) -> bool:
    key = override.partition("=")[0].strip()
    return any(key == one or key.startswith(f"{one}.") for one in _OWN)


def _launched(words: list[str], where: Where) -> int:
    """Run `dpo-dist launch` to its end; who asks this process to end asks that one."""
    gpus = [] if where.gpus is None else ["--gpus", str(where.gpus)]
    process = subprocess.Popen([sys.executable, "-m", "dpo_dist", "launch", *words, *gpus])
    before = {
        number: signal.signal(number, lambda given, _: process.send_signal(given))
        for number in (signal.SIGTERM, signal.SIGUSR1)
    }
    try:
        return process.wait()
    except KeyboardInterrupt:  # the terminal has asked both
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _told(one: Round, verdicts: list[Verdict], silent: list[str], max_drop: float, folder: str) -> list[str]:
    lines = [f"round {one.number}: held-out pairs preferred more than before it"]
    if one.reference is not None:
        lines = [f"round {one.number}: held-out pairs preferred more than by {one.reference}, before and after"]
    for verdict in verdicts:
        before = "" if verdict.before is None else f"{verdict.before:.1%} -> "
        lines.append(f"  {verdict.dataset} ({'old' if verdict.is_old else 'new'}): {before}{verdict.after:.1%}")
    lines += [f"  {name}: no pair of it is held out, so it is not judged" for name in silent]
    if not any(verdict.has_fallen(max_drop) for verdict in verdicts):
        return [*lines, f"accepted: the next round begins with {folder}/model"]
    return [
        *lines,
        f"not accepted: old feedback is kept worse than before by more than {max_drop:g} (--max-drop); the next round "
        f"begins with {one.model} again. Try a lower train.learning_rate or a higher loss.beta",
    ]
