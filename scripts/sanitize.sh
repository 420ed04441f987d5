#!/usr/bin/env bash
# Builds the native library with sanitizers, and runs the tests of kernels, engine and trellis: addresses and undefined
# behaviour, then data races. The first report ends it. Arguments go to pytest, in place of the folders of tests if they
# are paths. PYTHON=/path/to/python picks the interpreter, CXX the compiler. KINDS="thread" runs one kind alone.
# BUILD=/path keeps what was built, so that a second run compiles nothing.
set -euo pipefail
cd "$(dirname "$0")/.."

python=$(realpath -s "${PYTHON:-.venv/bin/python}") compiler=${CXX:-g++}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
build=${BUILD:-$work/build}
cp -r src/paley "$work"
# Other libraries synchronize in ways that ThreadSanitizer does not see; what they start is theirs.
printf 'called_from_lib:%s\n' libtorch_cpu.so libgomp libtorch_python.so libmkl > "$work/theirs"
export PYTHONPATH=$work PALEY_BACKEND=native PALEY_THREADS=own OMP_NUM_THREADS=1
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export TSAN_OPTIONS=halt_on_error=1:report_signal_unsafe=0:ignore_noninstrumented_modules=1:suppressions=$work/theirs

tests=(tests/kernels tests/runtime tests/core/test_trellis.py)
for argument in "$@"; do
    if [[ -e ${argument%%::*} ]]; then tests=(); fi
done
# A sanitizer keeps freed memory, and it compiles no program that replaces operator new.
skipped=(--deselect tests/runtime/test_engine.py::test_memory_stays_flat --ignore tests/kernels/test_parallel.py)
for kind in ${KINDS:-address,undefined thread}; do
    library=$build/${kind%%,*}/libpaley.so
    if [[ ! -e $library ]]; then
        mkdir -p "$build/${kind%%,*}"
        flags="-std=c++17 -O1 -g -fPIC -pthread -ffp-contract=off -fno-math-errno -fno-trapping-math"
        flags+=" -fno-omit-frame-pointer -fsanitize=$kind"
        # shellcheck disable=SC2086 # several flags
        ls csrc/*.cpp | xargs -P "$(env -u OMP_NUM_THREADS nproc)" -I{} sh -c \
            "$compiler $flags -c {} -o $build/${kind%%,*}/\$(basename {} .cpp).o"
        # shellcheck disable=SC2086
        "$compiler" $flags -shared "$build/${kind%%,*}"/*.o -o "$library"
    fi
    cp "$library" "$work/paley/kernels/libpaley.so"
    # Exceptions of C++ pass through the sanitizer, which finds their library when it starts or never.
    runtime="$("$compiler" -print-file-name="lib${kind:0:1}san.so") $("$compiler" -print-file-name=libstdc++.so.6)"
    LD_PRELOAD=$runtime "$python" -m pytest -q -s -p no:cacheprovider "${skipped[@]}" "${tests[@]}" "$@"
    echo "sanitize: $kind is clean"
done
