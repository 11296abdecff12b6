#!/usr/bin/env bash
# Run the tests from a fresh clone, set-up included:
#
#   ./launch/test.sh              the default set: what proves the product
#   ./launch/test.sh --all        everything but `-m slow` and `-m cluster`, which are run by hand before a release
#   ./launch/test.sh -m cluster tests/cluster    two machines and a real Slurm, as root
#   ./launch/test.sh -k losses    some of them; every pytest argument is passed on
#
# The first two run two tests at a time. A test that is skipped for a reason not listed in tests/plugin_skips.py fails
# the run. See launch/setup.sh for the environment variables.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "${1:-}" in --help) sed -n '2,/^$/s/^# \{0,1\}//p' launch/test.sh && exit 0 ;; esac
# shellcheck source=launch/setup.sh
source launch/setup.sh
set_up demo test

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Type-checked ranks compile what they import to be checked while they run; without a cache each of them does so anew.
unset PYTHONDONTWRITEBYTECODE
export HF_HUB_OFFLINE=1 # a test that reaches for the network must fail on every machine, not only without one
two_at_a_time=(--numprocesses 2 --dist loadfile --no-loadscope-reorder)
case "${1:-}" in
"") set -- "${two_at_a_time[@]}" -m "not slow and not thorough and not cluster" ;;
--all) set -- "${two_at_a_time[@]}" "${@:2}" ;;
esac
# In the foreground, so that `--pdb` has the terminal; Ctrl-C goes to pytest, and ranks it leaves behind end with us.
env "$mark" python -m pytest "$@"
