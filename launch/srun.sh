#!/usr/bin/env bash
# Be one rank of a run whose ranks srun has started: srun launch/srun.sh CONFIG [section.key=value ...]
#
# Without torchrun in between, signals and exit codes are those of the ranks. launch/slurm.sbatch uses it with
# LAUNCHER=srun.
#
#   HEAD     where the ranks meet: the name of the first node, and a port that no other run uses there, name:port
#   COMMAND  what they run: train, or precompute
#   FABRIC   the network between machines: infiniband, efa, tcpx, ethernet; none. See launch/fabric.sh

set -euo pipefail
case "${1:-}" in -h | --help | "") sed -n '2,/^$/s/^# \{0,1\}//p' "$0" && exit 0 ;; esac

head=${HEAD:?HEAD names the first node and a port, as in node0:29500}
export MASTER_ADDR=${head%:*} MASTER_PORT=${head##*:}
export RANK=${SLURM_PROCID:?srun has not started this} WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
# As in 8(x4): so many on each node.
export LOCAL_WORLD_SIZE=${SLURM_STEP_TASKS_PER_NODE%%[!0-9]*} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# shellcheck source=launch/fabric.sh
[ -z "${FABRIC:-}${FABRIC_INTERFACE:-}" ] || source "$(dirname "${BASH_SOURCE[0]}")/fabric.sh"
exec python -m dpo_dist "${COMMAND:-train}" "$@"
