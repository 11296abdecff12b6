"""One fresh process after another, and what each of them measured."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.trl.variants import Task, Variant, our_config, their_settings

ROOT = Path(__file__).parents[2]
COMPARED = ("loss", "grad_norm", "logps/chosen", "logps/rejected")
LAST_LINES = 5


@dataclass(frozen=True)
class Launcher:
    """Starts processes with the same number of threads.

    Attributes:
        task: what all do alike.
        trl_python: the interpreter that has TRL.
        limit: seconds, for each process.
    """

    task: Task
    trl_python: str
    limit: float

    def measure(self, variant: Variant, recompute: bool | None, label: str) -> dict[str, Any]:
        """What one fresh process measured, or {"failed": why}: memory that runs out in one ends no other."""
        out = self.task.folder / label
        if variant.side == "ours":
            return self._ours(variant, recompute, out)
        settings = out.with_suffix(".settings.json")
        settings.write_text(json.dumps(their_settings(self.task, variant, recompute, out)), encoding="utf-8")
        return self._run([self.trl_python, "-m", "benchmarks.trl.their_run"], out, [str(settings)]) or their_run(out)

    def peak(self, label: str) -> dict[str, float]:
        """GFLOP/s of matrix products, by shape.

        Raises:
            RuntimeError: they could not be measured.
        """
        out = self.task.folder / label
        arguments = [self.task.model, str(self.task.threads), f"{out}.json"]
        if failure := self._start([sys.executable, "-m", "benchmarks.trl.matrix_peak", *arguments], out):
            raise RuntimeError(failure)
        return json.loads(Path(f"{out}.json").read_text(encoding="utf-8"))

    def _ours(self, variant: Variant, recompute: bool | None, out: Path) -> dict[str, Any]:
        config = Path(f"{out}.yaml")  # JSON is YAML
        config.write_text(json.dumps(our_config(self.task, variant, recompute, out)), encoding="utf-8")
        patches = ",".join(sorted(variant.switches & {"packing", "head"})) or "none"
        return self._run([sys.executable, "-m", "benchmarks.trl.our_run"], out, [patches, str(config)]) or our_run(out)

    def _run(self, command: list[str], out: Path, arguments: list[str]) -> dict[str, Any]:
        failure = self._start([*command, f"{out}.json", *arguments], out)
        return {"failed": failure} if failure else {}

    def _start(self, command: list[str], out: Path) -> str:
        """Run it; why it failed, or ""."""
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        threads = {"OMP_NUM_THREADS": str(self.task.threads), "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
        log = Path(f"{out}.log")
        with log.open("w", encoding="utf-8") as file:
            try:
                done = subprocess.run(
                    command,
                    stdout=file,
                    stderr=file,
                    timeout=self.limit,
                    env={**os.environ, **threads},
                    cwd=self.task.folder,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                return f"not done after {self.limit:.0f} s"
        if done.returncode == 0 and Path(f"{out}.json").is_file():
            return ""
        last = " / ".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:])
        how = f"ended by signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        return f"{how} (9: the machine had no memory left): {last}" if done.returncode == -9 else f"{how}: {last}"


def our_run(out: Path) -> dict[str, Any]:
    """What `our_run` and the command's own metrics say of every step, as `their_run` says it."""
    text = (out / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [line for line in map(json.loads, text.splitlines()) if "split" not in line]
    return {
        "seconds": [line["time/step"] for line in lines],
        "tokens": [line["tokens_processed"] for line in lines],
        "logs": [{key: line[key] for key in COMPARED} for line in lines],
        **json.loads(Path(f"{out}.json").read_text(encoding="utf-8")),
    }


def their_run(out: Path) -> dict[str, Any]:
    """What TRL's process wrote: seconds, tokens and logged values of every step, and the peak of its memory."""
    found = json.loads(Path(f"{out}.json").read_text(encoding="utf-8"))
    return {
        "seconds": [later - earlier for earlier, later in pairwise(found["ends"])],
        "tokens": found["tokens"],
        "logs": [{key: line[key] for key in COMPARED} for line in found["logs"]],
        "peak_bytes": found["peak_bytes"],
        "version": found["version"],
        "optimizer": found["optimizer"],
    }
