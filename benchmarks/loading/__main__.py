"""Load and export a random model of 1.3 billion parameters on 4 ranks: python -m benchmarks.loading [OUT.json]

Ten gigabytes of memory and of disk; minutes on two cores. Prints what a rank held at most, in megabytes.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

RANKS, BYTES_PER_FILE = 4, 300_000_000
SIZES = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 20,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
LAYER_BYTES = 2 * 2048 * (2 * 2048 + 2 * 512 + 3 * 8192)  # bfloat16; without its norms


def run(folder: Path) -> list[dict[str, dict[str, float]]]:
    """What every rank saw of every part."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    made = [sys.executable, "-m", "benchmarks.gpu_kit.random_model", str(folder / "random"), json.dumps(SIZES)]
    subprocess.run(made, check=True, env=environment, capture_output=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    worker = ["-m", "benchmarks.loading.worker", str(folder / "random"), str(folder / "out.json"), str(BYTES_PER_FILE)]
    subprocess.run([*torchrun, *worker], check=True, env=environment, stderr=subprocess.DEVNULL)
    return json.loads((folder / "out.json").read_text())


def main() -> None:
    """Measure, print, and keep the numbers if a file is named."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = run(Path(folder))
    shard = ranks[0]["load"]["shard_bytes"]
    print(
        f"a rank's shard {shard / 1e6:.0f} MB, a layer {LAYER_BYTES / 1e6:.0f} MB, a file {BYTES_PER_FILE / 1e6:.0f} MB"
    )
    for part in ("transformers", "load", "export"):
        seen = [rank[part]["peak_bytes"] / 1e6 for rank in ranks]
        peaks = ", ".join(f"{peak:.0f}" for peak in seen)
        print(f"{part}: {ranks[0][part]['seconds']:.0f} s, at most {peaks} MB on ranks 0 to {RANKS - 1}")
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(ranks, indent=1) + "\n")


if __name__ == "__main__":
    main()
