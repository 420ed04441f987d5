"""A matrix made of codes as a file has them is that made of the codes one by one, to the byte."""

from __future__ import annotations

import pytest
import torch
from test_native_matmul import GRIDS, scheme_of, weight_of

from paley.core import packing
from paley.core.errors import PaleyError
from paley.core.rounding import Quantized
from paley.core.schemes import ActivationScheme
from paley.kernels import available, matmul
from paley.kernels.stored import StoredWeight

pytestmark = pytest.mark.skipif(not available(), reason="the native library was not built")


def stored(q: Quantized) -> StoredWeight:
    codes = packing.pack_codes(q.codes, q.grid.size)
    return StoredWeight("layer", codes, q.scales, q.zeros, q.grid, q.width, q.outliers)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("rows", "width", "group"), [(1, 48, None), (17, 132, 12), (33, 96, 24), (70, 1100, 220)])
def test_blobs_are_the_same(grid, rows, width, group, monkeypatch):
    """By the plan of this machine, and by that of one without AVX-512 VBMI, which has values in place of codes."""
    scheme = scheme_of(grid, group)
    q = weight_of(scheme, rows, width)
    made = matmul.plan(scheme, width)
    assert made is not None
    monkeypatch.setattr(matmul, "best_level", lambda: "avx2")
    for plan in (made, matmul.fastest(made)):
        assert torch.equal(matmul.prepare(stored(q), scheme, plan).blob, matmul.prepare(q, scheme, plan).blob)


@pytest.mark.parametrize(("grid", "outliers"), [("p2n256", 0), ("p2n88", 0), ("gauss4", 0), ("gauss4", 3)])
def test_any_width_and_outliers(grid, outliers):
    """A row of 37 values ends within a code, and within a byte."""
    for width in (37, 50):
        scheme = scheme_of(grid, None, ActivationScheme("int8") if outliers else None, outliers)
        q = weight_of(scheme, 19, width)
        assert torch.equal(matmul.prepare(stored(q), scheme).blob, matmul.prepare(q, scheme).blob)


def test_threads_change_nothing(monkeypatch):
    scheme = scheme_of("p2n256", 64)
    q = weight_of(scheme, 700, 1024)
    wanted = matmul.prepare(q, scheme).blob
    monkeypatch.setattr(matmul, "_PACKED", 1)
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert torch.equal(matmul.prepare(stored(q), scheme).blob, wanted)


def test_symbols_that_are_no_codes_are_refused():
    """88 points: two codes are a number below 7,744 in 13 bits."""
    scheme = scheme_of("p2n88")
    made = stored(weight_of(scheme, 20, 64))
    made.codes[13, 0:2] = 255
    with pytest.raises(PaleyError, match=r"layer: .* not 2 codes below 88; the file is damaged"):
        matmul.prepare(made, scheme)
