"""The command behind `benchmarks/gpu.sh`: all parts in order, gpu.json, gpu.md, the exit code."""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu_kit.against_trl import trl
from benchmarks.gpu_kit.bandwidth import bandwidth
from benchmarks.gpu_kit.ceilings import ceilings
from benchmarks.gpu_kit.golden import golden
from benchmarks.gpu_kit.kernels import kernels
from benchmarks.gpu_kit.kit import BUDGETS, TINY, Failed, Kit, Skipped, sizes_for
from benchmarks.gpu_kit.noise import self_check
from benchmarks.gpu_kit.page import page
from benchmarks.gpu_kit.profiling import profile
from benchmarks.gpu_kit.throughput import memory, throughput
from benchmarks.gpu_kit.variants import variants

FORMAT = 1  # of gpu.json
IMPORTED = ("torch", "deepspeed", "transformers", "datasets", "pyarrow", "dpo_dist.cli.training")
PARTS: dict[str, Callable[[Kit], dict[str, Any]]] = {
    "golden": golden,
    "ceilings": ceilings,
    "kernels": kernels,
    "throughput": throughput,
    "memory": memory,
    "self_check": self_check,
    "bandwidth": bandwidth,
    "profile": profile,
    "trl": trl,
    "variants": variants,
}
WITH_RATES = {"kernels", "throughput", "bandwidth", "trl", "variants"}  # which stand beside a ceiling


def main() -> int:
    """0: every part is as it must be, or was skipped for a reason; 1: one is not; 2: a mistake of the user's."""
    arguments = _arguments()
    out = Path(arguments.out).resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        return _refuse(f"--out={arguments.out} is there already; give a folder that is new or empty")
    try:
        for folder in ("work", "logs"):
            (out / folder).mkdir(parents=True)
    except OSError as error:
        return _refuse(f"--out={arguments.out} cannot be made ({error.strerror}); give another folder")
    # What it has started must end with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    warm_imports()
    kit = Kit(out, 1, TINY, {}, arguments.plant)
    sections: dict[str, Any] = {}
    chosen = chosen_parts(arguments.only)
    try:
        kit.begin("environment")
        sections["environment"] = section("environment", _look_around, kit, arguments.ranks)
        gpus = len(kit.environment.get("gpus", []))
        if gpus and kit.num_ranks > gpus:
            shutil.rmtree(out)
            return _refuse(f"--ranks={kit.num_ranks} is more than this machine's number of GPUs; give at most {gpus}")
        write_report(out, sections, kit.started)  # for who is killed in the first part, which may be a long one
        for name, part in PARTS.items():
            if name not in chosen:
                continue
            kit.begin(name)
            usable = sections["environment"]["status"] == "ok"
            sections[name] = section(name, part, kit) if usable else _skipped("the environment could not be seen")
            write_report(out, sections, kit.started)
    finally:
        shutil.rmtree(kit.work, ignore_errors=True)
    write_report(out, sections, kit.started)
    print(f"{out / 'gpu.json'}\n{out / 'gpu.md'}")
    return int(any(one["status"] == "failed" for one in sections.values()))


def chosen_parts(only: list[str] | None) -> set[str]:
    """What runs: all parts, or those that are asked for, and `ceilings` with those that report a rate."""
    chosen = set(only or PARTS)
    return chosen | {"ceilings"} if chosen & WITH_RATES else chosen


def warm_imports() -> None:
    """Import what ranks import, once: from a cold disk that takes a minute, which is no part's own."""
    print("== imports", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-c", f"import {', '.join(IMPORTED)}"], check=False)


def write_report(out: Path, sections: dict[str, Any], started: float) -> None:
    """gpu.json and gpu.md of the parts so far: who is killed leaves them."""
    report = {
        "format": FORMAT,
        "arguments": sys.argv[1:],
        "seconds": time.monotonic() - started,
        "sections": sections,
    }
    # A NaN is no JSON; it would be a fault to see, so it stays readable as one.
    (out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (out / "gpu.md").write_text(page(report), encoding="utf-8")


def section(name: str, part: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Run a part; whatever happens in it is its section, and the next part runs."""
    print(f"== {name}", file=sys.stderr, flush=True)
    started = time.monotonic()
    try:
        found = {"status": "ok", "values": part(*arguments)}
    except Skipped as skipped:
        found = _skipped(str(skipped))
    except Failed as failed:
        found = {"status": "failed", "reason": str(failed), "values": failed.values}
    except Exception as error:  # a part that breaks must not take the others with it
        where = traceback.format_exc().splitlines()[-12:]
        found = {"status": "failed", "reason": f"{type(error).__name__}: {error}", "traceback": where, "values": {}}
    told = f"   {found['status']}" + (f": {found['reason']}" if "reason" in found else "")
    print(told, file=sys.stderr, flush=True)
    return {**found, "seconds": time.monotonic() - started}


def _refuse(mistake: str) -> int:
    print(f"error: {mistake}", file=sys.stderr)
    return 2


def _skipped(reason: str) -> dict[str, Any]:
    return {"status": "skipped", "reason": reason, "seconds": 0.0}


def _look_around(kit: Kit, num_ranks: int | None) -> dict[str, Any]:
    """The environment, and what follows from it: sizes and ranks."""
    path = kit.work / "environment.json"
    kit.run(1, "environment", "benchmarks.gpu_kit.environment", str(path), limit=BUDGETS["environment"])
    kit.environment = json.loads(path.read_text(encoding="utf-8"))
    gpus = kit.environment["gpus"]
    kit.sizes = sizes_for(gpus)
    kit.num_ranks = num_ranks or len(gpus) or 2
    return kit.environment


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu.sh",
        description="Check and measure dpo_dist on this machine, in at most 10 minutes after its imports.",
    )
    parser.add_argument("--out", default="gpu_report", help="new folder for gpu.json, gpu.md and logs (%(default)s)")
    parser.add_argument("--ranks", type=_positive, help="processes; default: one for each GPU, 2 without a GPU")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--plant", choices=["beta"], help="a fault that `golden` and `trl` must find: twice the beta")
    return parser.parse_args()


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number of processes; give 1 or more")
    return int(text)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted; nothing is left running", file=sys.stderr)
        sys.exit(130)
