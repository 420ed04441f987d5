#!/usr/bin/env bash
# Makes .venv with Paley (editable) and its development tools: `make setup`.
# Safe to interrupt and to run again. PYTHON=/path/to/python picks the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv/bin/python
log=.venv/setup.log
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

say() { printf 'setup: %s\n' "$*"; }

fail() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
        if recent "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    fail "needs Python 3.11 or later, which ${PYTHON:-python3} is not ($("${PYTHON:-python3}" --version 2>&1 || true));" \
        "install one, or name it: make setup PYTHON=/path/to/python3.12"
}

# step NAME COMMAND...: one printed line, the command's own words only in the log.
step() {
    local name=$1 start=$SECONDS
    shift
    printf 'setup: %s ... ' "$name"
    if "$@" >"$log" 2>&1; then
        printf '%d s\n' $((SECONDS - start))
    else
        printf 'failed\n'
        return 1
    fi
}

install() { step "$1" "$venv" -m pip install --no-compile "${@:2}"; }

show_log_and_fail() {
    tail -n 15 "$log" >&2
    fail "pip failed (all it said: $log); put that right and run make setup again"
}

trap 'printf "\n"; fail "interrupted; make setup goes on from here"' INT

if ! { recent "$venv" && "$venv" -m pip --version >/dev/null 2>&1; }; then
    python=$(find_python)
    say "virtual environment .venv with $("$python" --version) ($python)"
    "$python" -m venv --clear .venv || fail "python -m venv failed; on Debian and Ubuntu: apt install python3-venv"
fi

# A GPU means that the default build is the right one; a torch that works is left alone.
if ! nvidia-smi -L >/dev/null 2>&1 && ! "$venv" -c 'import torch; torch.ones(1)' >/dev/null 2>&1; then
    pin=$(grep '^torch' constraints-cpu.txt)
    if ! install "no NVIDIA GPU: $pin" "$pin"; then
        # Replaced only where other releases exist, not where a broken connection ("none") kept this one away.
        grep -qE 'from versions: [^n)]|ResolutionImpossible' "$log" || show_log_and_fail
        say "$pin cannot be had for this Python and machine: taking the newest torch instead (may be large)"
    fi
fi
# -v: the log also has what the C++ compiler said.
install "paley, its native kernels and its development tools" -v -e ".[bench,dev]" || show_log_and_fail
# pip does it on one core; and where bytecode may not be written, each process would compile all it imports once more.
compile() { "$venv" -m compileall -q -j 0 .venv/lib || true; } # some packages hold templates that are no Python
step "bytecode" compile
if ! compgen -G "src/paley/kernels/libpaley.*" >/dev/null; then
    say "the native kernels were not built, slower torch code runs instead (the compiler's words: $log);" \
        "install a C++ compiler (on Debian and Ubuntu: apt install g++) and run make setup again"
fi
