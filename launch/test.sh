#!/usr/bin/env bash
# Run the tests from a fresh clone: ./launch/test.sh [pytest arguments], as in: ./launch/test.sh -k losses
#
# Does all set-up first (see launch/setup.sh for its environment variables). A test that is skipped for a reason not
# listed in tests/plugin_skips.py fails the run.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "${1:-}" in --help) sed -n '2,/^$/s/^# \{0,1\}//p' launch/test.sh && exit 0 ;; esac
# shellcheck source=launch/setup.sh
source launch/setup.sh
set_up demo test

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Launched ranks compile what they import to be checked while they run; without a cache each of them does so anew.
unset PYTHONDONTWRITEBYTECODE
export HF_HUB_OFFLINE=1 # a test that reaches for the network must fail on every machine, not only without one
# In the foreground, so that `--pdb` has the terminal; Ctrl-C goes to pytest, and ranks it leaves behind end with us.
env "$mark" python -m pytest "$@"
