#!/usr/bin/env bash
# Compiles the native library for aarch64 and runs tests/neon.cpp and tests/attention.cpp: with the cross compiler and QEMU
# (apt-get install g++-aarch64-linux-gnu qemu-user), or natively on an Arm machine. CXX and RUN name others.
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ $(uname -m) == aarch64 ]]; then
    compiler=${CXX:-g++} run=${RUN:-}
else
    compiler=${CXX:-aarch64-linux-gnu-g++} run=${RUN:-qemu-aarch64 -cpu max}
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
flags="-std=c++17 -O2 -pthread -static -ffp-contract=off -fno-math-errno -fno-trapping-math"
# shellcheck disable=SC2086 # several flags
ls csrc/*.cpp tests/neon.cpp tests/attention.cpp | xargs -P "$(env -u OMP_NUM_THREADS nproc)" -I{} sh -c \
    "$compiler $flags -c {} -o $work/\$(basename {} .cpp).o"
mkdir "$work/tests"
mv "$work/neon.o" "$work/attention.o" "$work/tests"
for test in neon attention; do
    # shellcheck disable=SC2086
    $compiler $flags "$work"/*.o "$work/tests/$test.o" -o "$work/$test"
    $run "$work/$test"
done
