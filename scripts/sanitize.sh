#!/usr/bin/env bash
# Builds the native kernels with sanitizers in a temporary folder, and runs their tests: addresses and undefined
# behaviour, then data races. The first report ends it. Arguments go to pytest. PYTHON=/path/to/python picks the
# interpreter, CXX the compiler.
set -euo pipefail
cd "$(dirname "$0")/.."

python=$(realpath -s "${PYTHON:-.venv/bin/python}") compiler=${CXX:-g++}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r src/paley "$work"
library=$work/paley/kernels/libpaley.so
# Other libraries synchronize in ways that ThreadSanitizer does not see; what they start is theirs.
printf 'called_from_lib:%s\n' libtorch_cpu.so libgomp libtorch_python.so libmkl > "$work/theirs"
export PYTHONPATH=$work PALEY_BACKEND=native PALEY_THREADS=own OMP_NUM_THREADS=1
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export TSAN_OPTIONS=halt_on_error=1:report_signal_unsafe=0:ignore_noninstrumented_modules=1:suppressions=$work/theirs

for kind in address,undefined thread; do
    flags=(-std=c++17 -O1 -g -fPIC -shared -pthread -ffp-contract=off -fno-math-errno -fno-trapping-math)
    "$compiler" "${flags[@]}" -fno-omit-frame-pointer -fsanitize=$kind csrc/*.cpp -o "$library"
    runtime=$("$compiler" -print-file-name="lib${kind:0:1}san.so")
    LD_PRELOAD=$runtime "$python" -m pytest -q -s -p no:cacheprovider tests/kernels "$@"
    echo "sanitize: $kind is clean"
done
