#!/usr/bin/env bash
# Train in a container on this machine: launch/container.sh CONFIG [section.key=value ...] [options of `dpo-dist launch`]
#
# The current folder is /work in the container: configuration, data and the run's folder lie there, with relative paths.
# How the images are built: docker/README.md. For several machines run it on each of them with NETWORK=host and
# --nodes, --gpus and --head.
#
#   ENGINE        docker or podman: what is installed
#   IMAGE         dpo-dist:cuda, or dpo-dist:cpu without a GPU
#   GPUS          the GPUs it sees: all, none, or as in docker's --gpus and podman's nvidia.com/gpu=...
#   CACHE         a volume or folder for models, tokenised data and compiled operators: dpo-cache
#   MOUNTS        more volumes, separated by spaces, as /data:/data:ro
#   SHM_SIZE      what processes exchange tensors in: 16g; `host` shares that of this machine (--ipc=host)
#   NETWORK       the engine's own; `host` for several machines
#   CONTAINER_ID  the user in the container: yours, as uid:gid
#   STOP_SECONDS  how long a step and a save may take after a stop request: 600
#   DRY_RUN       1 prints the command and starts nothing
#
# HF_TOKEN and WANDB_API_KEY are handed over by name where they are set, and stand in no command line.

set -euo pipefail
case "${1:-}" in -h | --help | "") sed -n '2,/^$/s/^# \{0,1\}//p' "$0" && exit 0 ;; esac

engine=${ENGINE:-$(command -v docker || command -v podman || true)}
[ -n "$engine" ] || { echo "error: neither docker nor podman is installed; name another one in ENGINE" >&2 && exit 2; }
present=$(nvidia-smi --list-gpus 2> /dev/null | grep -c "^GPU " || true)
gpus=${GPUS:-$([ "$present" -gt 0 ] && echo all || echo none)}
stop=${STOP_SECONDS:-600}

options=(--rm --init --ulimit memlock=-1 --user "${CONTAINER_ID:-$(id -u):$(id -g)}")
# The engine kills what still runs then; torchrun does before, and says so.
options+=(--stop-timeout "$((stop + 30))")
case ${SHM_SIZE:-16g} in host) options+=(--ipc=host) ;; *) options+=(--shm-size "${SHM_SIZE:-16g}") ;; esac
[ -z "${NETWORK:-}" ] || options+=(--network "$NETWORK")
case $gpus:${engine##*/} in
none:*) ;;
*:podman*) options+=(--device "nvidia.com/gpu=$gpus") ;;
*) options+=(--gpus "$gpus") ;;
esac
# Rootless podman would otherwise map this user to another one, to whom the folders do not belong.
case ${engine##*/} in podman*) options+=(--userns keep-id) ;; esac
options+=(--volume "${CACHE:-dpo-cache}:/cache" --volume "$PWD:/work" --workdir /work)
for mount in ${MOUNTS:-}; do options+=(--volume "$mount"); done
for name in HF_TOKEN WANDB_API_KEY HF_HUB_OFFLINE OMP_NUM_THREADS; do
  [ -z "${!name:-}" ] || options+=(--env "$name")
done
[ ! -t 0 ] || options+=(--interactive --tty)
image=${IMAGE:-$([ "$gpus" = none ] && echo dpo-dist:cpu || echo dpo-dist:cuda)}

command=("$engine" run "${options[@]}" "$image" dpo-dist launch "$@" --stop-seconds "$stop")
if [ "${DRY_RUN:-}" = 1 ]; then
  printf '%q ' "${command[@]}" && echo && exit 0
fi
exec "${command[@]}"
