"""Threads of the native kernels: where the system gives fewer than asked for, the rest do the work."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# operator new fails from the given allocation on, as if the memory went out while threads start.
PROGRAM = r"""
#include <atomic>
#include <cstdlib>
#include <new>
#include "parallel.h"

static std::atomic<int> left{1 << 30};
void* operator new(std::size_t size) {
  if (left.fetch_sub(1) <= 0) throw std::bad_alloc();
  return std::malloc(size);
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, std::size_t) noexcept { std::free(p); }

int main(int, char** arguments) {
  std::atomic<int> next{0}, done{0};
  left = std::atoi(arguments[1]);
  paley::run_workers(8, [&] {
    while (next.fetch_add(1) < 1000) ++done;
  });
  return done == 1000 ? 0 : 1;
}
"""


def test_memory_that_goes_out_while_threads_start_only_makes_it_slower(tmp_path):
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None or sys.platform == "win32":
        pytest.skip("needs a C++ compiler")
    source, program = tmp_path / "parallel.cpp", tmp_path / "parallel"
    source.write_text(PROGRAM)
    headers = Path(__file__).parents[2] / "csrc"
    flags = ["-std=c++17", "-pthread", f"-I{headers}"]
    subprocess.run([compiler, *flags, str(source), "-o", str(program)], check=True)
    for allocations in (0, 1, 2, 5, 1000):
        assert subprocess.run([program, str(allocations)], check=False).returncode == 0, allocations
