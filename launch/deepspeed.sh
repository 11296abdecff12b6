#!/usr/bin/env bash
# Train on one machine or many with DeepSpeed's launcher: launch/deepspeed.sh CONFIG [section.key=value ...]
#
# Run it on every machine, with the same arguments and variables but NODE_RANK; none reaches another one by ssh. All
# machines need the run's folder (train.output_dir) at the same path. With checkpoint.resume=auto a start goes on from the
# newest checkpoint.
#
# DeepSpeed's launcher does not pass on signals: SIGTERM ends it and leaves the ranks running. To stop a run:
# pkill -TERM -f deepspeed.launcher.launch, which gives them 30 s to save. launch/torchrun.sh does both better.
#
#   NPROC        processes on this machine: its GPUs, or 1 without one
#   NNODES       machines: 1
#   HEAD         where they meet, with more than one: the name of the first machine, or name:port; the port is 29500
#   NODE_RANK    with more than one: which of them this is, from 0
#   HOSTFILE     with more than one: a file with a line `name slots=GPUS` for each
#   FABRIC       the network between machines: infiniband, efa, tcpx, ethernet; none. See launch/fabric.sh
#   MASTER_PORT  with one machine: the port of the loopback interface at which its ranks meet; a free one

set -euo pipefail
case "${1:-}" in -h | --help | "") sed -n '2,/^$/s/^# \{0,1\}//p' "$0" && exit 0 ;; esac
# shellcheck source=launch/fabric.sh
source "$(dirname "${BASH_SOURCE[0]}")/fabric.sh"

# shellcheck source=launch/gpus.sh
source "$(dirname "${BASH_SOURCE[0]}")/gpus.sh"
nproc=${NPROC:-$((gpus > 0 ? gpus : 1))}
nnodes=${NNODES:-1}
fail() { echo "error: $*" >&2 && exit 2; }
# By --num_gpus DeepSpeed's launcher takes the first GPUs of the machine, whatever CUDA_VISIBLE_DEVICES says.
shown=
if [ "$gpus" -gt 0 ] && [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
  [ "$nproc" -le "$gpus" ] || fail "NPROC=$nproc is more than the $gpus GPUs that this machine shows"
  shown=$(cut -d , -f "1-$nproc" <<< "$CUDA_VISIBLE_DEVICES")
fi
if [ "$nnodes" -gt 1 ]; then
  head=${HEAD:?with NNODES=$nnodes, HEAD names the machine where all of them meet}
  case $head in *:*) ;; *) head=$head:29500 ;; esac
  rank=${NODE_RANK:?with NNODES=$nnodes, NODE_RANK says which of them this is, from 0}
  hosts=${HOSTFILE:?with NNODES=$nnodes, HOSTFILE is a file with a line for each: name slots=GPUS}
  [ -z "$shown" ] || [ "$shown" = "$(seq -s , 0 $((nproc - 1)))" ] ||
    fail "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES is not read by DeepSpeed's launcher on several machines; unset it"
  where=(--hostfile "$hosts" --num_nodes "$nnodes" --num_gpus "$nproc"
    --no_ssh --node_rank "$rank" --master_addr "${head%:*}" --master_port "${head##*:}")
else
  # The default port is that of every other run on this machine.
  free='import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
  if [ -n "$shown" ]; then where=(--include "localhost:$shown"); else where=(--num_gpus "$nproc"); fi
  where+=(--master_port "${MASTER_PORT:-$(python -c "$free")}")
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Without it the launcher looks for GPUs, and ends where there is none.
[ "$gpus" -gt 0 ] || export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
exec deepspeed "${where[@]}" --module dpo_dist train "$@"
