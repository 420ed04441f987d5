"""The reference: brute force in exact rational arithmetic, ties, odd numbers, and what it refuses."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from paley.core import nearest
from paley.core.errors import PaleyError
from paley.core.nearest import nearest_points, reference


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def brute_force(x: Tensor, points: Tensor) -> list[int]:
    """The first of the points at the least distance, without any rounding."""
    exact = [[Fraction(a) for a in c] for c in points.tolist()]
    codes = []
    for vector in x.tolist():
        v = [Fraction(a) for a in vector]
        distances = [sum((a - b) ** 2 for a, b in zip(v, c, strict=True)) for c in exact]
        codes.append(distances.index(min(distances)))
    return codes


@pytest.mark.parametrize("p", range(1, 9))
def test_equals_brute_force(p):
    x, points = normal(40, p), normal(23, p, seed=1)
    assert reference(x, points).tolist() == brute_force(x, points)


@pytest.mark.parametrize("p", [1, 2, 3])
def test_the_first_of_equally_near_points_wins(p):
    points = torch.cartesian_prod(*[torch.arange(-2.0, 2.0)] * p).view(-1, p)
    points = torch.cat([points, points])
    x = torch.cartesian_prod(*[torch.arange(-3.0, 3.0) + 0.5] * p).view(-1, p)
    assert reference(x, points).tolist() == brute_force(x, points)


def test_a_block_at_a_time_is_the_same(monkeypatch):
    x, points = normal(100, 3), normal(16, 3, seed=1)
    whole = reference(x, points)
    for block in (1, 16 * 7):
        monkeypatch.setattr(nearest, "_BLOCK", block)
        assert torch.equal(reference(x, points), whole)


def test_infinities_are_the_largest_numbers_and_nan_is_zero():
    largest = torch.finfo(torch.float32).max
    points = torch.tensor([[3.0, 3.0], [0.0, 0.0], [-3.0, 3.0]])
    odd = torch.tensor([[math.inf, 1.0], [-math.inf, math.nan], [math.nan, math.nan]])
    plain = torch.tensor([[largest, 1.0], [-largest, 0.0], [0.0, 0.0]])
    assert reference(odd, points).tolist() == reference(plain, points).tolist() == [0, 2, 1]


def test_any_shape_layout_and_floating_dtype():
    points = normal(16, 2, seed=1)
    x = normal(6, 5, 2)
    codes = nearest_points(x, points)
    assert (codes.shape, codes.dtype) == ((6, 5), torch.int32)
    assert torch.equal(nearest_points(x.transpose(0, 1), points), codes.T)
    assert torch.equal(nearest_points(x, points.T.contiguous().T), codes)
    assert torch.equal(nearest_points(x.double(), points.double()), codes)
    assert torch.equal(nearest_points(x.bfloat16(), points), nearest_points(x.bfloat16().float(), points))
    assert nearest_points(x[0, 0], points).shape == ()
    assert nearest_points(x[:0], points).shape == (0, 5)
    assert torch.equal(nearest_points(x[:, :, None], points), codes[:, :, None])
    with torch.inference_mode():
        assert torch.equal(nearest_points(x, points), codes)
    assert torch.equal(nearest_points(x.requires_grad_(), points), codes)


def test_meta_tensors_and_the_rules_for_ops():
    x, points = normal(6, 5, 2), normal(16, 2, seed=1)
    codes = nearest_points(x.to("meta"), points.to("meta"))
    assert (codes.shape, codes.dtype, codes.device.type) == ((6, 5), torch.int32, "meta")
    torch.library.opcheck(torch.ops.paley.nearest_points.default, (x, points))


@pytest.mark.gpu
@pytest.mark.parametrize("p", [1, 2, 4])
def test_a_gpu_gives_the_same_codes(p):
    x, points = normal(20000, p), normal(256, p, seed=1)
    x[:10000] = points[torch.randint(256, (10000, 2), generator=torch.Generator().manual_seed(2))].mean(1)  # near ties
    assert torch.equal(nearest_points(x.cuda(), points.cuda()).cpu(), reference(x, points))


@pytest.mark.parametrize(
    ("x", "points", "complaint"),
    [
        (torch.zeros(4, 3), torch.zeros(8, 2), r"x must be \[\.\.\., 2\].*got \[4, 3\]; reshape"),
        (torch.tensor(0.0), torch.zeros(8, 1), "x must be"),
        (torch.zeros(4, 2), torch.zeros(8), r"points must be \[n, p\].*got \[8\]"),
        (torch.zeros(4, 2), torch.zeros(0, 2), "points must be"),
        (torch.zeros(4, 9), torch.zeros(8, 9), "p <= 8"),
        (torch.zeros(4, 1), torch.zeros(65537, 1), "n <= 65536"),
        (torch.zeros(4, 1, dtype=torch.int32), torch.zeros(8, 1), r"floating-point tensors, got torch.int32"),
        (torch.zeros(4, 1), torch.tensor([[0.0], [math.nan]]), "NaN or infinities; give finite"),
        (torch.zeros(4, 1), torch.tensor([[1e300]], dtype=torch.float64), "NaN or infinities"),
    ],
)
def test_bad_input_is_refused(x, points, complaint):
    with pytest.raises(PaleyError, match=complaint):
        nearest_points(x, points)
