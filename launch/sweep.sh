#!/usr/bin/env bash
# Train one run for each line of a file on Slurm: launch/sweep.sh CONFIG FOLDER LINES [section.key=value ...]
#
# A line of LINES holds settings, as in: loss.beta=0.05 train.learning_rate=5e-7. Its run is in FOLDER, under the name of
# its settings. The reference is scored once, in a job of its own that all runs wait for (reference.source=cache);
# it must therefore not depend on a line. Afterwards: dpo-dist compare FOLDER
#
#   SBATCH_OPTIONS  for the jobs of the runs, as in "--nodes 2 --gpus-per-node 8 --time 12:00:00": none
#   SCORE_OPTIONS   for the job that scores the reference: the same
#   AT_ONCE         how many runs may train at the same time: all
#   REFERENCE       0: nothing is scored beforehand, as where the loss has no reference, or the cache is full already
#   DRY_RUN         1: print the commands, and submit nothing
#
# and those of launch/slurm.sbatch.

set -euo pipefail
case "${1:-}" in -h | --help | "") sed -n '2,/^$/s/^# \{0,1\}//p' "$0" && exit 0 ;; esac

[ $# -ge 3 ] || { echo "usage: launch/sweep.sh CONFIG FOLDER LINES [section.key=value ...]; --help says more" >&2 && exit 2; }
config=$1 folder=$2 lines=$3
shift 3
[ -r "$lines" ] || { echo "$lines cannot be read; write a line of settings for each run into it" >&2 && exit 2; }
if grep -qnE '^[[:space:]]*(#|$)' "$lines"; then
  echo "$lines: line $(grep -nE '^[[:space:]]*(#|$)' "$lines" | head -1 | cut -d: -f1) holds no settings; take it out" >&2
  exit 2
fi
count=$(grep -c '' "$lines" || true) # also of a last line without an end
[ "$count" -gt 0 ] || { echo "$lines is empty; write a line of settings for each run into it" >&2 && exit 2; }
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export LAUNCH_FOLDER=$here
read -ra options <<< "${SBATCH_OPTIONS:-}"
read -ra score_options <<< "${SCORE_OPTIONS:-${SBATCH_OPTIONS:-}}"

submit() { # prints the job's number
  if [ "${DRY_RUN:-0}" = 1 ]; then
    printf '%q ' sbatch --parsable "$@" >&2 && echo >&2 && echo 0
  else
    sbatch --parsable "$@"
  fi
}

shared=() wait=()
if [ "${REFERENCE:-1}" = 1 ]; then
  shared=(reference.source=cache)
  job=$(COMMAND=precompute submit --job-name=dpo_dist-reference "${score_options[@]}" \
    "$here/slurm.sbatch" "$config" "$folder" "${shared[@]}" "$@")
  wait=(--dependency="afterok:${job%%;*}" --kill-on-invalid-dep=yes)
fi
job=$(submit --array="1-$count${AT_ONCE:+%$AT_ONCE}" "${wait[@]}" "${options[@]}" \
  "$here/sweep.sbatch" "$config" "$folder" "$lines" "${shared[@]}" "$@")
echo "job ${job%%;*}: $count runs; afterwards: dpo-dist compare $folder"
