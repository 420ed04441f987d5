"""Attention over packed codes, compiled by itself with sanitizers, against sums of doubles: tests/attention.cpp."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ("steps_portable", "steps_avx2", "steps_avx512", "kv_cache", "dispatch")
FLAGS = ["-std=c++17", "-w", "-ffp-contract=off", "-fno-math-errno"]
SANITIZED = ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]  # -O1 compiles three times as long


def test_every_width_page_segment_and_window(tmp_path):
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    # The sums that the kernels are compared with only take time under sanitizers.
    sources = {ROOT / "csrc" / f"{part}.cpp": SANITIZED for part in PARTS} | {ROOT / "tests" / "attention.cpp": ["-O2"]}

    def build(source: Path) -> Path:
        made = tmp_path / f"{source.stem}.o"
        subprocess.run([compiler, *FLAGS, *sources[source], "-c", source, "-o", made], check=True)
        return made

    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(build, sources))
    subprocess.run([compiler, *FLAGS, *SANITIZED, *parts, "-o", tmp_path / "attention"], check=True)
    ran = subprocess.run([tmp_path / "attention"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "the best: 0 faults" in ran.stdout
