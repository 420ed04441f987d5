"""Native kernels equal the torch reference bit for bit, on every instruction set this machine has."""

from __future__ import annotations

import functools
import logging
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from paley import kernels
from paley.core.errors import PaleyError
from paley.core.nearest import nearest_points, reference
from paley.kernels import native

built = pytest.mark.skipif(not kernels.available(), reason=f"native kernels: {native.why_missing()}")
LEVELS = native.LEVELS[: native.LEVELS.index(native.best_level()) + 1] if kernels.available() else ()
SIZES = (2, 3, 16, 88, 256, 830, 4096)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@functools.cache
def expected(p: int, n: int, count: int) -> Tensor:
    return reference(normal(count, p), normal(n, p, seed=n))


def assert_exact(x: Tensor, points: Tensor, threads: int = 1) -> None:
    codes = reference(x, points)
    for level in LEVELS:
        assert torch.equal(native.nearest_points(x, points, level=level, threads=threads), codes), level


@built
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("p", range(1, 9))
@pytest.mark.parametrize("n", SIZES)
def test_ragged_counts(p, n, level):
    for count in (0, 1, 17, 3001):
        x, points = normal(count, p), normal(n, p, seed=n)
        assert torch.equal(native.nearest_points(x, points, level=level, threads=1), expected(p, n, count))


@built
@pytest.mark.parametrize(("p", "n", "count"), [(1, 3, 100_000), (2, 256, 100_000), (4, 830, 40_000)])
def test_threads_change_nothing(p, n, count):
    x, points = normal(count, p), normal(n, p, seed=n)
    codes = reference(x, points)
    for threads in (1, 2, 3, 64):
        assert torch.equal(native.nearest_points(x, points, threads=threads), codes)


@built
@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_exact_ties_go_to_the_first(p):
    side = torch.arange(-4.0, 4.0)
    points = torch.cartesian_prod(*[side] * p).view(-1, p)
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(p))
    points = torch.cat([points[order], points[order.flip(0)]])  # and every point twice
    x = torch.randint(-9, 9, (5000, p), generator=torch.Generator().manual_seed(0)) / 2
    assert_exact(x, points)


@built
@pytest.mark.parametrize("p", range(1, 9))
@pytest.mark.parametrize("scale", [1.0, 1e-3, 300.0, 1e-30, 1e17])
def test_near_ties_are_told_apart(p, scale):
    """Midpoints of neighbours, and floats just beside them: float32 alone gets many of these wrong."""
    points = normal(300, p, seed=p) * scale
    near = torch.cdist(points, points).topk(4, largest=False).indices[:, 1:]
    middle = ((points[:, None].double() + points[near].double()) / 2).flatten(0, 1).float()
    x = torch.cat([middle, middle.nextafter(middle.new_tensor(math.inf)), middle * (1 + 2**-20)]).repeat(4, 1)
    assert_exact(x, points)


@built
def test_float32_alone_would_not_do():
    """Else the tests of near ties prove nothing."""
    points = normal(300, 2, seed=2)
    near = torch.cdist(points, points).topk(2, largest=False).indices[:, 1]
    x = (points + points[near]) / 2
    single = (x @ points.T - points.square().sum(1) / 2).argmax(1)
    assert (single != reference(x, points)).sum() > 10


@built
@pytest.mark.parametrize("p", [1, 2, 4, 8])
def test_odd_numbers(p):
    x = normal(6000, p)
    places = torch.randint(0, x.numel(), (600,), generator=torch.Generator().manual_seed(1))
    odd = torch.tensor([math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-45, -1e-42, 0.0, -0.0, 1e20])
    x.view(-1)[places] = odd.repeat(60)
    for points in (normal(256, p, seed=1), normal(256, p, seed=1) * 5e37, normal(100, p, seed=1) * 1e-42):
        assert_exact(x, points)
        assert_exact(torch.full((100, p), math.nan), points)


@built
@pytest.mark.parametrize("p", [1, 2, 3])
def test_data_without_spread(p):
    """Cells have no width where all vectors, all points, or one coordinate of either are equal."""
    points, x = normal(100, p, seed=1), normal(3000, p)
    assert_exact(torch.zeros(3000, p), points)
    assert_exact(x, torch.ones(100, p))
    assert_exact(x * torch.tensor([0.0, 1.0, 1.0])[:p], points)
    assert_exact(x, points * torch.tensor([0.0, 1.0, 1.0])[:p])
    assert_exact(x + 50, points)
    assert_exact(torch.cat([x, x * 1e6]), points)


@built
def test_many_points():
    assert_exact(normal(700, 2), normal(65536, 2, seed=1))


@built
def test_a_level_that_this_machine_lacks_is_refused(monkeypatch):
    x, points = normal(3, 2), normal(4, 2)
    with pytest.raises(PaleyError, match="level 'avx' is none of portable, avx2, avx512"):
        native.nearest_points(x, points, level="avx")
    monkeypatch.setattr(native, "level_number", lambda what, level, best: native.LEVELS.index(best) + 1)
    with pytest.raises(PaleyError, match="paley_nearest_points failed: bad argument"):  # by the library itself
        native.nearest_points(x, points)
    monkeypatch.undo()
    monkeypatch.setattr(native, "best_level", lambda: "portable")
    with pytest.raises(PaleyError, match="lacks instructions of level 'avx512'; its best is 'portable'"):
        native.nearest_points(x, points, level="avx512")
    assert torch.equal(native.nearest_points(x, points), reference(x, points))


@built
def test_the_op_runs_the_kernel(monkeypatch):
    assert kernels.register() is kernels.register()
    monkeypatch.delenv("PALEY_BACKEND", raising=False)
    calls = []
    plain = native.nearest_points
    monkeypatch.setattr(native, "nearest_points", lambda *args: calls.append(args) or plain(*args))
    x, points = normal(6, 50, 2), normal(16, 2, seed=1)
    assert torch.equal(nearest_points(x, points), reference(x, points))
    assert torch.equal(nearest_points(x.bfloat16().transpose(0, 1), points), reference(x.bfloat16(), points).T)
    with torch.inference_mode():
        assert nearest_points(x[:0], points).shape == (0, 50)
    assert nearest_points(x.to("meta"), points.to("meta")).shape == (6, 50)
    assert len(calls) == 3
    monkeypatch.setenv("PALEY_BACKEND", "reference")
    assert torch.equal(nearest_points(x, points), reference(x, points))
    assert len(calls) == 3


@pytest.fixture
def no_library(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "libpaley.so")
    kernels._resolve.cache_clear()
    yield tmp_path / "libpaley.so"
    kernels._resolve.cache_clear()


def test_without_the_library_auto_says_once_what_it_took(no_library, caplog, monkeypatch):
    monkeypatch.delenv("PALEY_BACKEND", raising=False)
    kernels.register()
    with caplog.at_level(logging.INFO, logger="paley"):
        x, points = normal(10, 2), normal(4, 2)
        assert torch.equal(nearest_points(x, points), reference(x, points))
        nearest_points(x, points)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "torch reference" in record.message
    assert "install a C++ compiler" in record.message
    assert not kernels.available()
    assert native.why_missing() in record.message


def test_without_the_library_native_is_refused(no_library, monkeypatch):
    kernels.register()
    with pytest.raises(PaleyError, match=r"libpaley.so was not built: install a C\+\+ compiler and run `make setup`"):
        kernels.backend("native")
    monkeypatch.setenv("PALEY_BACKEND", "native")
    with pytest.raises(PaleyError, match="was not built"):
        nearest_points(normal(10, 2), normal(4, 2))
    assert kernels.backend("reference") == "reference"


def test_an_unknown_backend_is_refused():
    with pytest.raises(PaleyError, match="'nativ' is none of auto, native, reference; did you mean 'native'"):
        kernels.backend("nativ")


def test_what_is_no_library_is_refused(no_library):
    no_library.write_bytes(b"not a library")
    with pytest.raises(PaleyError, match="cannot be loaded"):
        native.load()


@built
@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        ('extern "C" int paley_abi_version() { return 12345; }', r"another version of Paley \(ABI 12345, needed"),
        ("int nothing;", "cannot be loaded"),
        (f'extern "C" int paley_abi_version() {{ return {native.ABI_VERSION}; }}', "cannot be loaded"),
    ],
)
def test_a_stale_library_is_refused(no_library, code, complaint):
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None or sys.platform == "win32":
        pytest.skip("needs a C++ compiler")
    source = no_library.with_suffix(".cpp")
    source.write_text(code)
    subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(no_library)], check=True)
    with pytest.raises(PaleyError, match=complaint):
        native.load()


def test_the_two_abi_versions_are_one():
    header = Path(__file__).parents[2] / "csrc" / "paley.h"
    assert f"#define PALEY_ABI_VERSION {native.ABI_VERSION}\n" in header.read_text()
