"""The native product of bfloat16 values has the bits of its meaning, on every level and with any number of threads."""

from __future__ import annotations

import pytest
import torch

from paley.core.errors import PaleyError
from paley.core.products import reference
from paley.kernels import available, native, products

pytestmark = pytest.mark.skipif(not available(), reason="the native kernels were not built")

LEVELS = native.LEVELS[: native.LEVELS.index(products.best_level()) + 1] if available() else ()
SIZES = [(1, 1, 1), (3, 100, 7), (9, 50, 513), (37, 49, 1025), (130, 97, 600)]


def tiles(level):
    return level == "amx_bf16"


def numbers(rows, columns, seed, *, along_rows):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=g) * torch.randn(columns, generator=g).exp()
    return x.contiguous() if along_rows else x.T.contiguous().T


@pytest.mark.parametrize("along_rows", [True, False])
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
@pytest.mark.parametrize("level", LEVELS)
def test_it_has_the_bits_of_the_reference(level, m, n, k, along_rows):
    a, b = numbers(m, k, 0, along_rows=along_rows), numbers(n, k, 1, along_rows=not along_rows)
    start = torch.randn(m, n, generator=torch.Generator().manual_seed(2))
    for threads in (1, 3):
        expected = reference(a, b, tiles=tiles(level))
        assert torch.equal(products.products(a, b, level=level, threads=threads), expected)
        added = products.products(a, b, start.clone(), level=level, threads=threads)
        assert torch.equal(added, reference(a, b, start.clone(), tiles=tiles(level)))


@pytest.mark.parametrize("level", LEVELS)
def test_the_upper_half_is_that_of_the_whole(level):
    x = numbers(131, 700, 3, along_rows=False)
    whole, half = (products.products(x, x, upper=upper, level=level) for upper in (False, True))
    assert torch.equal(whole.triu(), half.triu())
    assert torch.equal(whole, whole.T)


@pytest.mark.parametrize("level", LEVELS)
def test_special_values_are_rounded_as_bfloat16_rounds_them(level):
    odd = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -0.0, 1e-40, 3e38, -3.4e38, float("inf"), float("nan"), 2**-126])
    one = torch.ones(1, 1)
    rounded = products.products(odd[:, None].contiguous(), one, level=level)
    torch.testing.assert_close(rounded, reference(odd[:, None], one), rtol=0, atol=0, equal_nan=True)
    assert rounded[:4, 0].tolist() == [1.0, 1 + 2**-6, 0.0, 0.0]


def test_it_is_the_product_to_within_the_rounding_of_its_inputs():
    a, b = torch.randn(40, 900), torch.randn(30, 900)
    exact = a.bfloat16().double() @ b.bfloat16().double().T
    torch.testing.assert_close(products.products(a, b).double(), exact, rtol=1e-5, atol=1e-3)
    assert (products.products(a, b) - a @ b.T).abs().max() < 900**0.5 * 2**-6


def test_nothing_to_sum_gives_zeros():
    assert products.products(torch.empty(2, 0), torch.empty(3, 0)).tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize(
    ("a", "b", "out", "message"),
    [
        (torch.ones(2, 3), torch.ones(2, 4), None, r"a \[m, k\] and b \[n, k\], got \[2, 3\] and \[2, 4\]"),
        (torch.ones(2, 3).double(), torch.ones(2, 3), None, "a must be float32 on the CPU, got torch.float64"),
        (torch.ones(2, 3), torch.ones(2, 3), torch.ones(4, 2).T[:, :2], "out must be contiguous"),
    ],
)
def test_what_c_cannot_read_is_refused(a, b, out, message):
    with pytest.raises(PaleyError, match=message):
        products.products(a, b, out)
