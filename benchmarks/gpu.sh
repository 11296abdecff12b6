#!/usr/bin/env bash
# Check and measure dpo_dist on this machine's GPUs: benchmarks/gpu.sh [--out FOLDER] [--ranks N]
# It takes at most 10 minutes after its imports, which from a cold disk take a minute.
#
# Writes FOLDER/gpu.json and FOLDER/gpu.md (default: gpu_report), which say of each part what was measured, or why not.
# Without a GPU the same runs on two processes with tiny sizes. Uses the Python environment that is active; --help lists
# the arguments, benchmarks/README.md says more. Exit code: 0 fine, 1 a part is not as it must be, 2 a mistake in the call.

set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

way="see 'Install' in docs/running.md, then activate that environment (. .venv/bin/activate)"
command -v python > /dev/null || fail "there is no python; $way"
missing=$(python - << 'PYTHON'
from importlib.util import find_spec
print(*[name for name in ("torch", "transformers", "deepspeed", "jaxtyping", "yaml", "typer") if find_spec(name) is None])
PYTHON
) || fail "python does not start; $way"
[ -z "$missing" ] || fail "$(command -v python) has no $missing; $way"

export PYTHONPATH=$repo${PYTHONPATH:+:$PYTHONPATH}
exec python -m benchmarks.gpu_kit "$@"
