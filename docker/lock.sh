#!/usr/bin/env bash
# Remakes docker/locks, every version and hash that goes into an image, from pyproject.toml and constraints.txt.
# Needs uv, which is on PyPI. What constraints.txt does not name stays as it was locked.
#
#   docker/lock.sh                       # a quarter of a minute; read `git diff docker/locks` before it is committed
#   docker/lock.sh --upgrade-package wandb        # every argument is passed on to `uv pip compile`
#
# Environment, optional:
#   TORCH_CPU_LINKS   page or folder with links to torch's CPU builds, as in Dockerfile.cpu; default: PyTorch's own page

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

lock() { # lock NAME ARGUMENT...
  local name=$1
  shift
  printf 'docker/locks/%s.txt\n' "$name"
  uv pip compile --quiet --system-certs --generate-hashes --constraint constraints.txt --custom-compile-command docker/lock.sh \
    --python-platform x86_64-manylinux_2_28 --output-file "docker/locks/$name.txt" "$@"
}

extras=(--extra wandb --extra mlflow)

# What builds the packages that are on PyPI as source only (DeepSpeed, flash-attn) and dpo-dist itself.
printf '%s\n' pip setuptools wheel packaging ninja psutil hatchling | lock build - --python-version 3.11 "$@"
lock cuda pyproject.toml "${extras[@]}" --python-version 3.12 "$@"
# On its own, because torch must be installed before it can be compiled; what it needs is in cuda.txt.
echo flash-attn | lock flash-attn - --no-deps --python-version 3.12 "$@"
# Which build of torch is meant can only be said by its local version; a range would take PyPI's, with CUDA.
sed -n 's/^torch==.*/&+cpu/p' constraints.txt | lock cpu - pyproject.toml "${extras[@]}" --python-version 3.11 \
  --find-links "${TORCH_CPU_LINKS:-https://download.pytorch.org/whl/cpu/torch/}" "$@"
