#!/usr/bin/env bash
# Train a real language model by DPO on this machine's CPU, from a fresh clone: ./launch/quickstart.sh [section.key=value ...]
#
# SmolLM2-135M-Instruct on the project's own preference pairs: 2 processes, policy and reference sharded by ZeRO-3.
# Does all set-up first (see launch/setup.sh for its environment variables), then trains into
# runs/quickstart-<date>-<time>. Arguments override the configuration, as in: train.max_steps=2 loss.beta=0.5
# Paths in arguments are relative to the repository.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "${1:-}" in -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' launch/quickstart.sh && exit 0 ;; esac
# shellcheck source=launch/setup.sh
source launch/setup.sh
set_up demo

output_dir=runs/quickstart-$(date +%Y%m%d-%H%M%S)-$$
for argument in "$@"; do
  case $argument in train.output_dir=*) output_dir=${argument#*=} ;; esac
done
absolute_dir=$(realpath -m -- "$output_dir")

# One thread for each rank: more of them than cores makes gloo's ranks wait for each other.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
run=(configs/smollm2_demo.yaml "train.output_dir=$output_dir" "$@")
# What is wrong with an argument is said by one process, before two are launched.
env "$mark" python -m dpo_dist check "${run[@]}" --ranks 2 > /dev/null

say "Training into $output_dir"
run_stoppable torchrun --standalone --nproc-per-node 2 -m dpo_dist train "${run[@]}"

if [ ! -d "$output_dir/model" ]; then
  again=("$@")
  for argument in "train.output_dir=$output_dir" checkpoint.resume=auto; do
    case " $* " in *" $argument "*) ;; *) again+=("$argument") ;; esac
  done
  say "Stopped on request. To go on: $0$(printf ' %q' "${again[@]}")"
  exit 0
fi
say "Done"
cat << MESSAGE
model        $absolute_dir/model            loads with transformers' from_pretrained
ask it       $venv/bin/python -c "from transformers import pipeline; print(pipeline('text-generation', '$absolute_dir/model', do_sample=False, max_new_tokens=60)([{'role': 'user', 'content': 'Why is the sky blue?'}])[0]['generated_text'][-1]['content'])"
metrics      $absolute_dir/metrics.jsonl    a line for every step and every evaluation
settings     $absolute_dir/config.yaml      reproduces the run, in another train.output_dir
curves       $venv/bin/tensorboard --logdir $absolute_dir
MESSAGE
