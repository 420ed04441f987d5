"""When Triton's kernels are taken; and their own tests, which need a process with Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from paley.kernels import gpu
from paley.ops.matmul import PRODUCTS, Triton

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("PALEY_TRITON", raising=False)
    forget = gpu.why_not.cache_clear
    forget()
    yield
    forget()


def test_without_triton_or_a_gpu_there_are_none(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert gpu.why_not() == "the package triton is missing; PyTorch for CUDA brings it"
    gpu.why_not.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.why_not() == "PyTorch sees no GPU"
    assert not gpu.runs_on(CUDA)
    assert not gpu.runs_on(CPU)


def test_a_gpu_takes_them_only_if_told(monkeypatch):
    monkeypatch.setattr(gpu, "why_not", lambda: None)
    assert (gpu.runs_on(CUDA), gpu.runs_on(CPU), gpu.chosen(CUDA)) == (True, False, False)
    monkeypatch.setenv("PALEY_TRITON", "1")
    assert (gpu.chosen(CUDA), gpu.chosen(CPU)) == (True, False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert (gpu.chosen(CUDA), gpu.chosen(CPU)) == (False, True)
    assert PRODUCTS["triton"] is Triton


@pytest.mark.slow
def test_the_kernels_by_the_interpreter():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: pip install --no-deps triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/test_gpu_kernels.py"]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
