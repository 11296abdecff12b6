#!/usr/bin/env bash
# Train on one machine or many with torchrun: launch/torchrun.sh CONFIG [section.key=value ...]
#
# Run it on every machine, with the same arguments and variables. All machines need the run's folder (train.output_dir)
# at the same path. A start with checkpoint.resume=auto goes on from the newest checkpoint.
#
#   NPROC         processes on this machine: its GPUs, or 1 without one
#   NNODES        machines: 1
#   HEAD          where they meet, with more than one: the name of one of them, or name:port; the port is 29500
#   RUN_ID        with more than one: a name that only the machines of this run use: dpo_dist
#   COMMAND       what they run: train, or precompute
#   FABRIC        the network between machines: infiniband, efa, tcpx, ethernet; none. See launch/fabric.sh
#   STOP_SECONDS  how long a step and a save may take after a stop request, before ranks are killed: 600
#
# SIGTERM, SIGINT and SIGUSR1 stop the run after its step, with a checkpoint.

set -euo pipefail
case "${1:-}" in -h | --help | "") sed -n '2,/^$/s/^# \{0,1\}//p' "$0" && exit 0 ;; esac
# shellcheck source=launch/fabric.sh
source "$(dirname "${BASH_SOURCE[0]}")/fabric.sh"

# shellcheck source=launch/gpus.sh
source "$(dirname "${BASH_SOURCE[0]}")/gpus.sh"
warn() { echo "warning: $*" >&2; }
case $gpus:${FABRIC:-none} in
0:*) ;;
*:infiniband | *:efa)
  # Both register the memory that they read and write, which locks it.
  locked=$(ulimit -l)
  [ "$locked" = unlimited ] || warn "FABRIC=$FABRIC needs locked memory, of which ulimit -l allows $locked KiB;" \
    "have it set to unlimited: memlock in limits.conf, LimitMEMLOCK of slurmd, --ulimit memlock=-1 of a container"
  ;;
esac
if [ "$gpus" -gt 1 ]; then
  shm=$(df -Pk /dev/shm 2> /dev/null | awk 'NR == 2 { print $2 }')
  # NCCL's buffers lie there where GPUs do not reach each other directly. A container has 64 MiB unless it gets more.
  [ "${shm:-1048576}" -ge 1048576 ] || warn "/dev/shm has $((shm / 1024)) MiB for the processes of $gpus GPUs;" \
    "give it 1 GiB or more: --shm-size or --ipc=host of a container"
fi
nproc=${NPROC:-$((gpus > 0 ? gpus : 1))}
nnodes=${NNODES:-1}
if [ "$nnodes" -gt 1 ]; then
  head=${HEAD:?with NNODES=$nnodes, HEAD names the machine where all of them meet}
  case $head in *:*) ;; *) head=$head:29500 ;; esac
  meet=(--rdzv-backend c10d --rdzv-endpoint "$head" --rdzv-id "${RUN_ID:-dpo_dist}")
else
  # They meet in a file: nothing then listens but on the loopback interface.
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
  meet=(--rdzv-backend c10d --rdzv-conf store_type=file --rdzv-endpoint "$(mktemp -u -t dpo_dist-XXXXXX)")
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# torchrun dies of SIGUSR1 unless it is told to pass it on, and kills its ranks 30 s after a signal.
exec torchrun --nnodes "$nnodes" --nproc-per-node "$nproc" --max-restarts 0 "${meet[@]}" \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout "${STOP_SECONDS:-600}" \
  -m dpo_dist "${COMMAND:-train}" "$@"
