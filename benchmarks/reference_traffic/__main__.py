"""Elements that a rank gets and gives in a step under ZeRO-3: python -m benchmarks.reference_traffic [OUT.json]

Two processes on this machine and a random model of 0.2 million parameters; a minute. Ends with 1 if a
setting is more than 3 % off what it should be. `--defaults` leaves DeepSpeed's own limits, within which a model as
small as this is gathered once and kept: the table then shows what such a measurement is worth, and the exit code is 1.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

RANKS, TOLERANCE = 2, 0.03
MICRO_BATCHES = (1, 2, 4)
# By where the reference comes from: N of a step with G micro-batches. The policy gathers twice and reduces once for
# each; a live reference gathers once for each, or once for the step; one that is read from a cache never.
EXPECTED = {
    "per micro-batch": lambda g: 4 * g,
    "once for a step": lambda g: 3 * g + 1,
    "cached": lambda g: 3 * g,
}


def run(folder: Path, keep_defaults: bool) -> dict[str, dict[str, list[float]]]:
    """What the first rank counted, in N, by setting and number of micro-batches."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    arguments = [str(folder), ",".join(map(str, MICRO_BATCHES)), "defaults" if keep_defaults else "large"]
    command = [*torchrun, "-m", "benchmarks.reference_traffic.worker", *arguments]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-4000:])
    return json.loads((folder / "out.json").read_text())


def main() -> None:
    """Count, print, and keep the numbers if a file is named."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--defaults"]
    with tempfile.TemporaryDirectory() as folder:
        measured = run(Path(folder), "--defaults" in sys.argv)
    print("| reference | G | gathered, N | reduced, N | together | expected | ratio |")
    print("|---|---|---|---|---|---|---|")
    worst = 0.0
    for setting, formula in EXPECTED.items():
        for g in MICRO_BATCHES:
            gathered, reduced = measured[setting][str(g)]
            ratio = (gathered + reduced) / formula(g)
            worst = max(worst, abs(ratio - 1))
            print(
                f"| {setting} | {g} | {gathered:.3f} | {reduced:.3f} | {gathered + reduced:.3f} | {formula(g)} "
                f"| {ratio:.3f} |"
            )
    if arguments:
        Path(arguments[0]).write_text(json.dumps(measured, indent=1) + "\n")
    print(f"at most {100 * worst:.1f} % off")
    sys.exit(worst > TOLERANCE)


if __name__ == "__main__":
    main()
