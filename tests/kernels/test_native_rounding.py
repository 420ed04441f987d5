"""Native rounding gives the bits of the torch code: every grid, rule and Hadamard order, every level, any threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from paley.core import grids, rounding
from paley.core.errors import PaleyError
from paley.core.schemes import ActivationScheme
from paley.core.transforms import Transform
from paley.kernels import available, native
from paley.kernels import rounding as kernel

pytestmark = pytest.mark.skipif(not available(), reason="the native kernels were not built")

HALF, SINGLE = torch.float16, torch.float32
EVEN = grids.custom(torch.tensor([[-1.5], [-0.75], [0.0], [0.75], [1.5]]))
UNEVEN = grids.custom(torch.randn(300, 1, generator=torch.Generator().manual_seed(9)))

# grid, scale rule, clip ratio, group size
ROUNDINGS = [
    ("uint2", "absmax", 1.0, None), ("uint3", "absmax", 0.95, 12), ("uint4", "absmax", 0.95, None),
    ("uint8", "absmax", 1.0, 6), ("int4", "absmax", 0.9, None), ("int8", "absmax", 1.0, 20), ("odd3", "rms", 1.0, 30),
    ("odd2", "absmax", 1.0, None), ("gauss2", "rms", 1.0, None), ("gauss3", "absmax", 0.8, 12),
    ("gauss4", "rms", 1.0, None), ("gauss4", "rms", 0.97, 60), ("gauss5", "rms", 1.0, 4), ("gauss8", "rms", 1.1, None),
    ("nf4", "absmax", 1.0, 10), (EVEN, "absmax", 1.0, 12), (EVEN, "rms", 1.0, None),
    (UNEVEN, "rms", 1.0, None),
]  # fmt: skip

# in_dim, out_dim, order: dense factors 1, 12, 20, 28, 36, 60; padded; of one value
TRANSFORMS = [
    (120, 120, 12), (120, 120, 24), (120, 120, 60), (120, 120, 20), (120, 120, 2), (120, 120, 8), (120, 120, 4),
    (113, 120, 40), (37, 60, 1), (55, 60, 60),
]  # fmt: skip
LARGE = [
    (576, 576, 288), (576, 576, 576), (1536, 1536, 512), (1536, 1536, 1536), (896, 896, 448), (896, 896, 896),
    (4864, 4864, 304), (640, 640, 320), (2048, 2048, 2048), (64, 64, 64), (256, 256, 256), (172, 172, 172),
    (1300, 1344, 112), (352, 352, 44),
]  # fmt: skip


def scheme_of(grid, rule, clip_ratio, group_size, refit=False):
    return ActivationScheme(grid, rule, clip_ratio, group_size, refit)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Tokens of very different sizes; some are constant, zero, tiny or huge."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    x *= torch.logspace(-4, 4, shape[-2])[:, None]
    if shape[-2] > 8:
        x[..., 1, :] = 0.0
        x[..., 2, :] = -0.0
        x[..., 3, :] = 0.1
        x[..., 4, :] = x[..., 4, :].abs()
        x[..., 5, :] *= 1e-38
        x[..., 6, :] *= 1e35
        x[..., 7, ::3] *= 1e-12
    return x


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, except that NaN equals NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.dtype == torch.uint8:
        return torch.equal(a, b)
    nan = a.isnan() & b.isnan()
    kind = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return torch.equal(a.masked_fill(nan, 0).view(kind), b.masked_fill(nan, 0).view(kind))


def ways():
    for level in native.LEVELS[: native.LEVELS.index(native.best_level()) + 1]:
        for threads in (1, 3):
            yield {"level": level, "threads": threads}


def check(x: Tensor, scheme, transform=None, diagonal=None, scale_dtype=SINGLE) -> None:
    turned = x if diagonal is None else x / diagonal
    turned = turned if transform is None else transform.apply(turned)
    want = turned if scheme is None else rounding.round_trip(turned, scheme, scale_dtype)
    coded = None
    if scheme is not None and scheme.grid.size <= 256:
        coded = rounding.quantize_dynamic(turned.contiguous(), scheme, scale_dtype)
    for how in ways():
        assert same(kernel.round_trip(x, scheme, scale_dtype, transform=transform, diagonal=diagonal, **how), want), how
        if coded is not None:
            made = kernel.quantize_dynamic(x, scheme, scale_dtype, transform=transform, diagonal=diagonal, **how)
            assert same(made.codes, coded.codes), how
            assert same(made.scales, coded.scales), how
            assert (made.zeros is None) == (coded.zeros is None)
            assert made.zeros is None or same(made.zeros, coded.zeros), how


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("scale_dtype", [SINGLE, HALF])
@pytest.mark.parametrize("case", ROUNDINGS, ids=str)
def test_rounding(case, scale_dtype, refit):
    check(normal(19, 60), scheme_of(*case, refit), scale_dtype=scale_dtype)


@pytest.mark.parametrize("dims", [*TRANSFORMS, *LARGE], ids=str)
@pytest.mark.parametrize("seed", [None, 5])
def test_transforms(dims, seed):
    x = normal(19, dims[0])
    check(x, None, Transform(*dims, seed))
    check(x, scheme_of("gauss4", "rms", 1.0, None), Transform(*dims, seed))


@pytest.mark.parametrize("dims", [*TRANSFORMS, *LARGE], ids=str)
@pytest.mark.parametrize("seed", [None, 5])
def test_transforms_back(dims, seed):
    transform, y = Transform(*dims, seed), normal(19, dims[1])
    for how in ways():
        assert same(kernel.turn_back(y, transform, **how), transform.adjoint(y)), how


@pytest.mark.parametrize("case", ROUNDINGS, ids=str)
def test_all_at_once(case):
    diagonal = torch.rand(113, generator=torch.Generator().manual_seed(1)) + 0.5
    check(normal(2, 3, 17, 113), scheme_of(*case), Transform(113, 120, 40, seed=3), diagonal, HALF)


@pytest.mark.parametrize("tokens", [0, 1, 2, 15, 16, 17, 100])
def test_ragged_numbers_of_tokens(tokens):
    check(normal(tokens, 24), scheme_of("uint3", "absmax", 0.95, 8), Transform(24, 24, 12, seed=3))


@pytest.mark.parametrize("width", range(1, 40))
def test_ragged_widths(width):
    for case in (("uint4", "absmax", 0.95, None), ("gauss4", "rms", 1.0, None), ("gauss6", "absmax", 1.0, None)):
        check(normal(9, width), scheme_of(*case))
        check(normal(9, width), scheme_of(*case, refit=True))


@pytest.mark.parametrize("transform", [None, Transform(60, 60, 12, seed=1)])
@pytest.mark.parametrize("case", [c for c in ROUNDINGS if c[3] == 12 or c[3] is None], ids=str)
def test_numbers_that_are_not_finite(case, transform):
    x = normal(9, 60)
    for row, value in enumerate((torch.nan, torch.inf, -torch.inf, torch.nan)):
        x[row, 7 * row :: 31] = value
    x[8, 3], x[8, 4] = torch.inf, -torch.inf
    turned = x if transform is None else transform.apply(x)
    for refit in (False, True):
        scheme = scheme_of(*case, refit)
        for scale_dtype in (SINGLE, HALF):
            want = rounding.round_trip(turned, scheme, scale_dtype)
            for how in ways():
                assert same(kernel.round_trip(x, scheme, scale_dtype, transform=transform, **how), want)


def test_views_are_read_as_they_are():
    x = normal(9, 2 * 24)[:, ::2]
    check(x, scheme_of("uint4", "absmax", 1.0, None))
    check(normal(24, 9).T, scheme_of("uint4", "absmax", 1.0, None))
    before = x.clone()
    kernel.round_trip(x.contiguous(), scheme_of("int4", "absmax", 1.0, None), transform=Transform(24, 24, 12, 1))
    assert torch.equal(x, before)


def test_ties_and_edges_of_a_table():
    grid = grids.as_fixed("gauss4")
    assert isinstance(grid, grids.Grid)
    edges = grid.edges.float()
    x = torch.cat([edges, edges.nextafter(torch.tensor(9.0)), edges.nextafter(torch.tensor(-9.0))])
    x = torch.cat([x, torch.tensor([grid.peak])])[None]  # of absmax the scale is 1
    check(x, scheme_of("gauss4", "absmax", 1.0, None))


def test_float16_scales_are_rounded_as_torch_does():
    sizes = torch.cat([torch.logspace(-9, 6, 4001), torch.tensor([2.0**-24, 2.0**-25, 65504.0, 65519.0, 1e30, 0.0])])
    check(sizes[:, None] * torch.tensor([1.0, -0.5]), scheme_of("int2", "absmax", 1.0, None), scale_dtype=HALF)


def test_what_the_kernels_cannot_read_is_refused():
    scheme, x = scheme_of("uint4", "absmax", 1.0, None), torch.randn(3, 24)
    for call in (
        lambda: kernel.round_trip(x.double(), scheme),
        lambda: kernel.round_trip(x, scheme, transform=Transform(12, 12, 12)),
        lambda: kernel.round_trip(x, scheme, diagonal=torch.ones(23)),
        lambda: kernel.turn_back(x, Transform(24, 48, 12)),
        lambda: kernel.round_trip(x, scheme_of("uint4", "absmax", 1.0, 7)),
        lambda: kernel.quantize_dynamic(x, scheme_of(UNEVEN, "rms", 1.0, None)),
        lambda: kernel.round_trip(x, scheme, torch.float64),
    ):
        with pytest.raises(PaleyError):
            call()
