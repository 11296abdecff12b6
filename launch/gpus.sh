# shellcheck shell=bash disable=SC2034
# How many GPUs a process of this machine is shown, as $gpus; to be sourced.
case ${CUDA_VISIBLE_DEVICES-all} in
all) gpus=$(nvidia-smi --list-gpus 2> /dev/null | grep -c "^GPU " || true) ;;
"" | -1) gpus=0 ;;
*) gpus=$(tr , '\n' <<< "$CUDA_VISIBLE_DEVICES" | wc -l) ;;
esac
