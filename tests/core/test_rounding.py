"""Rounding: the nearest point by brute force, one meaning for its two paths, and no input that breaks it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from paley.core import grids
from paley.core.errors import PaleyError
from paley.core.rounding import (
    Quantized,
    check_groups,
    fitting_group_size,
    mean,
    quantize_dynamic,
    round_trip,
)
from paley.core.schemes import ActivationScheme

NAMES = [f"{family}{bits}" for family in grids.FAMILIES for bits in range(grids.MIN_BITS, grids.MAX_BITS + 1)]
SCHEMES = [
    ActivationScheme(name, scale, clip_ratio, group_size)
    for name in NAMES
    for scale, clip_ratio in (("absmax", 1.0), ("absmax", 0.8), ("rms", 1.0))
    for group_size in (None, 8)
    if not (scale == "rms" and grids.load(name).affine)
]
each_scheme = pytest.mark.parametrize(
    "scheme", SCHEMES, ids=lambda s: f"{s.grid.name}-{s.scale}-{s.clip_ratio}-{s.group_size}"
)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of very different sizes, all of one sign in the last."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    sizes = torch.logspace(-3, 3, shape[-2])[:, None]
    sizes[-1] = 1
    x = x * sizes
    x[..., -1, :] = x[..., -1, :].abs() + 1
    return x.to(dtype)


def same_bits(x: Tensor, y: Tensor) -> bool:
    kinds = {2: torch.int16, 4: torch.int32}
    return x.dtype == y.dtype and torch.equal(x.view(kinds[x.element_size()]), y.view(kinds[y.element_size()]))


@each_scheme
def test_round_trip_is_dequantize_after_quantize_bit_for_bit(scheme):
    wide = normal(2, 24, 5)
    for x in (
        normal(2, 5, 24),
        wide.transpose(1, 2),
        normal(5, 48)[:, ::2],
        normal(2, 5, 24, dtype=torch.bfloat16),
        normal(2, 5, 24, dtype=torch.bfloat16).transpose(0, 1),
        normal(5, 24, dtype=torch.float16) / 64,
        normal(5, 24)[:0],
    ):
        before = x.clone()
        for scale_dtype in (torch.float16, torch.float32):
            left = round_trip(x, scheme, scale_dtype)
            assert same_bits(left, quantize_dynamic(x, scheme, scale_dtype).dequantize(x.dtype))
        assert torch.equal(x, before)
    assert same_bits(round_trip(x, scheme), round_trip(x, scheme, torch.float32))


@each_scheme
def test_what_is_stored(scheme):
    x, grid = normal(2, 5, 24), scheme.grid
    q = quantize_dynamic(x, scheme)
    groups = 24 // (scheme.group_size or 24)
    assert (q.codes.dtype, q.codes.shape) == (torch.uint8, x.shape)
    assert int(q.codes.max()) < 2**grid.bits
    assert (q.scales.dtype, q.scales.shape) == (torch.float16, (2, 5, groups))
    assert (q.zeros is not None) == grid.affine
    if q.zeros is not None:
        assert (q.zeros.dtype, q.zeros.shape) == (torch.uint8, q.scales.shape)
        assert int(q.zeros.max()) < 2**grid.bits
    assert (q.grid, q.group_size) == (scheme.grid, 24 // groups)


@each_scheme
def test_no_point_is_nearer(scheme):
    x, grid = normal(2, 6, 24), scheme.grid
    q = quantize_dynamic(x, scheme)
    size = q.group_size
    scales = q.scales.double().repeat_interleave(size, -1)[..., None]
    zeros = 0.0 if q.zeros is None else q.zeros.double().repeat_interleave(size, -1)[..., None]
    everywhere = (grid.points[:, 0] - zeros) * scales
    least = (everywhere - x.double()[..., None]).abs().amin(-1)
    error = (q.dequantize().double() - x.double()).abs()
    assert (error <= least + 1e-6 * x.abs().amax(-1, keepdim=True)).all()
    if scheme.scale == "absmax" and scheme.clip_ratio == 1 and grid.step is not None:
        # Half a step, half of one for a rounded zero point, and what the end loses to a scale of 11 bits.
        steps = grid.step / 2 + grid.affine / 2 + grid.peak * 2.0**-11
        assert (error <= steps * scales[..., 0]).all()


@pytest.mark.parametrize("name", NAMES)
def test_points_of_the_grid_stay(name):
    grid = grids.load(name)
    n = len(grid.points)
    scales = torch.tensor([0.25, 2.0**-9, 48.0])[:, None, None]
    zeros = torch.tensor([0.0, n // 3, n - 1])[:, None, None] if grid.affine else None
    codes = torch.arange(n, dtype=torch.uint8).expand(3, 1, n)
    x = grid.dequantize(codes.flatten(-2), scales[..., 0], None if zeros is None else zeros[..., 0])
    assert torch.equal(grid.quantize(x[:, None], scales, zeros), codes[:, 0])
    if not grid.affine:  # int grids have a lowest point that no symmetric scale reaches
        x = x[:, x[0].abs() <= x[0].max()]
    # float16 holds these scales, and so takes them to the bit whatever float32 made of max|x| / peak.
    assert torch.equal(round_trip(x, ActivationScheme(name), torch.float16), x)


def test_ties_and_the_outermost_points():
    grid = grids.load("int3")
    x = torch.tensor([[-100.0, -4.5, -3.49, 0.49, 2.51, 3.6, 100.0]])[:, None]
    codes = grid.quantize(x, torch.ones(1, 1, 1))
    assert codes.flatten().tolist() == [0, 0, 1, 4, 7, 7, 7]


@each_scheme
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32])
def test_zeros_stay_and_extremes_are_finite(scheme, scale_dtype):
    x = torch.zeros(8, 24)
    huge = 1e18 if scheme.scale == "rms" else 1e38  # the square of what is larger has no float32
    x[1] = huge
    x[2] = -huge
    x[3, ::2], x[3, 1::2] = huge, -huge
    x[4] = 1e-30
    x[5] = torch.finfo(torch.float32).smallest_normal / 2**20
    x[6, 0] = huge  # an outlier among zeros
    x[7] = torch.linspace(-1, 1, 24) * 1e-7
    left = round_trip(x, scheme, scale_dtype)
    assert left.isfinite().all()
    assert same_bits(left, quantize_dynamic(x, scheme, scale_dtype).dequantize())
    grid = scheme.grid
    nearest_to_zero = 0.0 if grid.affine else float(grid.points.abs().min())
    smallest_scale = 2.0**-24 if scale_dtype == torch.float16 else torch.finfo(torch.float32).tiny
    assert left[0].abs().max() <= nearest_to_zero * smallest_scale  # 0 where the grid has a 0
    bound = (2 * x[4:].abs()).clamp(min=nearest_to_zero * smallest_scale)
    assert (left[4:].abs() <= bound.amax(-1, keepdim=True)).all()


@pytest.mark.parametrize("name", ["int4", "odd3", "gauss3", "uint4"])
def test_clip_ratios_scale_the_scales(name):
    x = normal(5, 24)
    whole, half = (quantize_dynamic(x, ActivationScheme(name, clip_ratio=r), torch.float32) for r in (1.0, 0.5))
    torch.testing.assert_close(half.scales, whole.scales / 2)
    if not grids.load(name).affine:
        torch.testing.assert_close(whole.scales[:, 0], x.abs().amax(-1) / grids.load(name).peak)
        rms = quantize_dynamic(x, ActivationScheme(name, "rms", 0.5), torch.float32)
        expected = 0.5 * x.square().mean(-1).sqrt() * grids.load(name).gaussian_scale
        torch.testing.assert_close(rms.scales[:, 0], expected)


@pytest.mark.parametrize("k", [1, 2, 3, 30, 64, 577])
def test_a_mean_is_summed_by_halves(k):
    x, single = normal(5, k), lambda value: float(torch.tensor(value))  # to float32
    sums = x[0].tolist()
    while len(sums) > 1:
        half = len(sums) // 2
        folded = [single(a + b) for a, b in zip(sums[:half], sums[-half:], strict=True)]
        sums = folded + sums[half:-half]
    got = mean(x.clone())
    assert got.shape == (5, 1)
    assert float(got[0]) == single(sums[0] / k)
    torch.testing.assert_close(got.double(), x.double().mean(-1, keepdim=True), rtol=1e-5, atol=1e-3)


def test_an_affine_grid_reaches_both_ends():
    x = torch.tensor([[-1.0, 0.0, 0.3, 2.0], [1.0, 2.0, 3.0, 3.0], [-4.0, -3.0, -2.0, -1.0], [-1.7, 0, 1, 1.3]])
    q = quantize_dynamic(x, ActivationScheme("uint2"), torch.float32)
    assert q.zeros is not None
    assert q.zeros.flatten().tolist() == [1, 0, 3, 2]
    assert q.scales.flatten().tolist() == pytest.approx([1, 1, 4 / 3, 1])  # 0 is always within
    assert q.dequantize().tolist()[:2] == [[-1, 0, 0, 2], [1, 2, 3, 3]]


def test_groups_have_scales_of_their_own():
    x = torch.cat([normal(5, 8), 1000 * normal(5, 8, seed=1)], -1)
    grouped = round_trip(x, ActivationScheme("int4", group_size=8))
    alone = torch.cat([round_trip(part, ActivationScheme("int4")) for part in x.split(8, -1)], -1)
    assert torch.equal(grouped, alone)
    assert not torch.equal(round_trip(x, ActivationScheme("int4")), alone)
    for use in (round_trip, quantize_dynamic):
        with pytest.raises(
            PaleyError, match="dimension 16 is no multiple of group_size=5; set a divisor such as 4 or 8"
        ):
            use(x, ActivationScheme("int4", group_size=5))


@pytest.mark.parametrize(
    ("n", "group_size", "fitting"),
    [
        (896, 128, 128), (320, 128, 160), (172, 128, 86), (352, 128, 88), (384, 256, 192), (172, 64, 43), (24, 8, 8),
        (32, 24, 32),  # 16 is as near
        (64, 128, 64), (63, 128, 63), (1, 128, 1),
        (514, 128, 257), (257, 128, 257),  # 2 and 1 are too small, whatever is far
    ],
)  # fmt: skip
def test_a_group_size_is_fitted_to_a_width(n, group_size, fitting):
    assert fitting_group_size(n, group_size) == fitting


def test_fitted_groups_are_the_nearest_of_those_that_are_large_enough():
    for n in range(1, 200):
        for group_size in (1, 2, 7, 32, 100, 128):
            fitting = fitting_group_size(n, group_size)
            assert n % fitting == 0
            assert fitting == n or 2 * fitting >= group_size
            others = [d for d in range(1, n + 1) if n % d == 0 and 2 * d >= group_size and d != fitting]
            assert all((abs(d - group_size), fitting) > (abs(fitting - group_size), d) for d in others)
            assert fitting == group_size or n % group_size


@pytest.mark.parametrize(
    ("n", "group_size", "near"), [(320, 128, "80 or 160"), (24, 128, "24"), (257, 128, "257"), (1, 2, "1")]
)
def test_groups_that_do_not_fill_a_dimension_are_refused_with_the_divisors_around(n, group_size, near):
    check_groups(n, None, "here")
    check_groups(n, n, "here")
    wanted = rf"^here: x={n} is no multiple of group_size={group_size}; set a divisor such as {near}, or leave$"
    with pytest.raises(PaleyError, match=wanted):
        check_groups(n, group_size, "here", what="x=", way_out=", or leave")


def test_quantized_dequantizes_to_any_dtype():
    codes, scales = torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8), torch.tensor([[0.5, 2.0]])
    assert Quantized(codes, scales, None, "odd2").dequantize().tolist() == [[-1.5, -0.5, 2.0, 6.0]]
    zeros = torch.tensor([[1, 3]], dtype=torch.uint8)
    found = Quantized(codes, scales.half(), zeros, "uint2").dequantize(torch.bfloat16)
    assert found.dtype == torch.bfloat16
    assert found.tolist() == [[-0.5, 0.0, -2.0, 0.0]]
