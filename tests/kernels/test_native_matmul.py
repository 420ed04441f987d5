from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from paley.core import grids, trellis
from paley.core.errors import PaleyError
from paley.core.grids import FreeGrid
from paley.core.rounding import Outliers, Quantized, codes_per_row
from paley.core.schemes import ActivationScheme, LinearScheme, WeightScheme
from paley.core.transforms import Transform
from paley.core.trellis import TrellisGrid
from paley.kernels import available, matmul
from paley.kernels.integers import integers
from paley.ops.inputs import round_input

pytestmark = pytest.mark.skipif(not available(), reason="the native library was not built")

GRIDS = [
    "int2", "int3", "int4", "int6", "int8", "uint2", "uint3", "uint4", "uint7", "uint8", "odd3", "gauss2", "gauss3",
    "gauss4", "gauss6", "gauss8", "nf4", "p2n16", "p2n64", "p2n88", "p2n256", "p2n1024", "p2n4096", "p3n512",
    "p4n256", "p4n4096", "e8q14k4", "free1", "free2", "mirror2", "free3", "trellis1", "trellis1.5",
    "trellis2", "trellis2.5", "trellis3", "trellis3.5", "trellis4", "trellis5", "trellis6",
]  # fmt: skip


def scheme_of(
    grid: str, group: int | None = None, inputs: ActivationScheme | None = None, outliers: int = 0,
    transform: Transform | None = None,
) -> LinearScheme:  # fmt: skip
    loaded = grids.load(grid)
    scale = "em" if loaded.free else "rms" if loaded.p > 1 or loaded.sequential else "absmax"
    return LinearScheme(WeightScheme(loaded, group, "nearest", scale), inputs, transform, outliers)


def weight_of(scheme: LinearScheme, rows: int, width: int, seed: int = 0) -> Quantized:
    assert scheme.weight is not None
    g = torch.Generator().manual_seed(seed)
    grid, groups = scheme.weight.grid, width // (scheme.weight.group_size or width)
    codes = torch.randint(min(grid.size, 2**31 - 1), (rows, codes_per_row(width, grid.p)), generator=g)
    codes = codes.to(grid.code_dtype)
    scales = torch.rand(rows, groups, *grid.scale_shape, generator=g).sort(-1).values.add(0.01).half()
    zeros = torch.randint(grid.size, (rows, groups), generator=g).byte() if grid.affine else None
    outliers = None
    if scheme.outliers:
        columns = torch.randperm(width, generator=g)[: scheme.outliers].sort().values.int()
        values = torch.randint(1, 256, (rows, scheme.outliers), generator=g).byte()
        outliers = Outliers(columns, values, torch.rand(rows, 1, generator=g).half())
    return Quantized(codes, scales, zeros, grid, width, outliers)


def decoded(inputs: Tensor, made: matmul.Plan, tokens: int, width: int, columns: Tensor | None) -> Tensor:
    """What the integers of `encode` stand for, float64 [tokens, width]."""
    per = 2 if made.fine else made.p if made.kind.startswith("look") else 4
    block = 8 * per
    sizes = [min(made.segment, made.group - at) for at in range(0, made.group, made.segment)] * (width // made.group)
    pieces = [(size, per) for size in sizes]
    if columns is not None:
        pieces.append((len(columns), 2 if made.fine else 4))
    row = -(-sum(32 * -(-size // (8 * p)) for size, p in pieces) // 64) * 64
    row += 64 * (row % 1024 == 0)
    codes = inputs[: tokens * row].view(tokens, row)
    steps = inputs[tokens * row :][: 4 * tokens * len(pieces)].view(torch.float32).view(tokens, -1).double()
    sums = (
        inputs[tokens * row + 4 * tokens * len(pieces) :][: 4 * tokens * len(pieces)].view(torch.int32).view(tokens, -1)
    )
    out, own, at = [], None, 0
    for s, (size, p) in enumerate(pieces):
        length = 32 * -(-size // (8 * p))
        part = codes[:, at : at + length].contiguous()
        values = part.view(torch.int16) if made.fine else part.view(torch.int8)
        if p == 3:
            assert not values[:, 3::4].any()
            values = values.unflatten(1, (-1, 4))[..., :3].flatten(1)
        assert not values[:, size:].any()
        assert torch.equal(values.long().sum(1), sums[:, s].long())
        values = values[:, :size].double() * steps[:, s, None]
        at += length
        if columns is not None and s == len(pieces) - 1:
            own = values
        else:
            out.append(values)
    x = torch.cat(out, 1)
    if own is not None and columns is not None:
        assert not x[:, columns.long()].any()
        x[:, columns.long()] = own
    assert block > 0
    return x


def points_of(q: Quantized, made: matmul.Plan) -> Tensor:
    """The weight with its points rounded to integers, float64."""
    limit = 4095 if made.fine else 127
    if isinstance(q.grid, FreeGrid):
        points = q.grid.group_points(q.scales.float())
        scales = (points.abs().amax(-1, keepdim=True) / limit).half().clamp(min=2.0**-24).float()
        points = (points / scales).round().clamp(-limit, limit).double() * scales.double()
        w = points.gather(-1, q.codes.unflatten(-1, (points.shape[1], -1)).long()).flatten(-2)
    else:
        if isinstance(q.grid, grids.Grid):
            table, scale, _ = integers(q.grid, limit)
            w = table.double()[q.codes.long()].flatten(1)[:, : q.width] * scale
        else:
            w = q.grid.look_up(q.codes, q.width)
            scale = q.grid.step_size if isinstance(q.grid, TrellisGrid) else float(w.abs().max()) / limit
            w = (w / scale).round().double() * scale
        w = w.unflatten(1, (q.scales.shape[1], -1))
        if q.zeros is not None:
            w = w - q.zeros.double()[..., None]
        w = (w * q.scales.double()[..., None]).flatten(1)
    if q.outliers is not None:
        w[:, q.outliers.columns.long()] = q.outliers.dequantize().double()
    return w


def check(scheme: LinearScheme, rows: int, width: int, tokens: int, seed: int = 0) -> Tensor:
    q = weight_of(scheme, rows, width, seed)
    matrix = matmul.prepare(q, scheme)
    narrow = width if scheme.transform is None else scheme.transform.in_dim
    x = torch.randn(tokens, narrow, generator=torch.Generator().manual_seed(seed + 1))
    inputs = matmul.encode(x, matrix, scheme)
    y = matmul.matmul(inputs, tokens, matrix, level="portable", threads=1)
    values = decoded(inputs, matrix.plan, tokens, width, matrix.outlier_columns)
    want = values @ points_of(q, matrix.plan).T
    size = values.abs() @ points_of(q, matrix.plan).abs().T
    assert bool(((y.double() - want).abs() <= 2e-6 * size).all())
    for level in matmul.levels():
        for threads in (1, 3):
            assert torch.equal(matmul.matmul(inputs, tokens, matrix, level=level, threads=threads), y), level
    if tokens > 1:  # a token's result does not depend on the others
        alone = matmul.encode(x[1:2], matrix, scheme)
        assert torch.equal(matmul.matmul(alone, 1, matrix), y[1:2])
    rounded = round_input(x, scheme, matrix.outlier_columns).double()
    exact = matrix.plan.map is not None
    assert float((values - rounded).norm() / rounded.norm()) < (0.08 if not exact else 0.02)
    return y


@pytest.mark.parametrize("grid", GRIDS)
def test_products_are_those_of_the_integers_on_every_level(grid: str) -> None:
    check(scheme_of(grid, 96), 37, 192, 3)
    check(scheme_of(grid), 16, 240, 1)


@pytest.mark.parametrize(
    "grid",
    [
        "int4",
        "uint3",
        "gauss3",
        "gauss2",
        "p1n64",
        "gauss5",
        "free2",
        "p2n64",
        "p2n256",
        "p4n256",
        "p4n4096",
        "p2n4096",
        "int8",
    ],
)
@pytest.mark.parametrize("tokens", [1, 2, 4, 7, 17, 50])
def test_ragged_shapes(grid: str, tokens: int) -> None:
    p = grids.load(grid).p
    for rows, width, group in ((1, 4 * 7, None), (17, 4 * 33, 4 * 11), (33, 8 * 3 * p, 2 * p), (70, 1100, 220)):
        check(scheme_of(grid, group), rows, width, tokens, seed=rows)


@pytest.mark.parametrize("grid", trellis.names())
@pytest.mark.parametrize("tokens", [1, 2, 5, 17])
def test_trellis_codes_stay_codes(grid: str, tokens: int) -> None:
    """Groups and segments begin within a ring, and with it; rows of other widths are held as values."""
    for rows, width, group in ((1, 32, None), (17, 96, None), (33, 480, 160), (16, 1088, 544)):
        scheme = scheme_of(grid, group)
        made = matmul.plan(scheme, width)
        assert made is not None
        assert made.kind == grid
        check(scheme, rows, width, tokens, seed=rows)
    whole = matmul.plan(scheme_of(grid), 1024)
    assert whole is not None
    assert whole.bits(1024) < grids.load(grid).bits + 0.07
    ragged = matmul.plan(scheme_of(grid), 1000)
    assert ragged is not None
    assert ragged.kind == "bytes"
    check(scheme_of(grid), 5, 72, tokens)


def test_single_values_of_six_bits() -> None:
    scheme = scheme_of("int6", None, ActivationScheme("int8"))
    made = matmul.plan(scheme, 192)
    assert made is not None
    assert made.kind == "table6"
    check(scheme, 20, 192, 3)


def test_trellis_codes_with_rounded_inputs() -> None:
    check(scheme_of("trellis4", 64, ActivationScheme("gauss4", group_size=32)), 20, 192, 5)
    check(scheme_of("trellis5", None, ActivationScheme("int8")), 20, 192, 3)


def test_without_permutations_of_bytes_trellis_codes_are_held_as_values(monkeypatch: pytest.MonkeyPatch) -> None:
    made = matmul.plan(scheme_of("trellis3"), 256)
    assert made is not None
    monkeypatch.setattr(matmul, "best_level", lambda: "avx2")
    assert matmul.fastest(made).kind == "bytes"
    monkeypatch.setattr(matmul, "best_level", lambda: "avx512")
    assert matmul.fastest(made) == made


def test_trellis_lists_are_checked() -> None:
    scheme = scheme_of("trellis2")
    q = weight_of(scheme, 4, 64)
    book = q.grid.codebook
    for broken in (replace(book, points=[*book.points[:-1], 128]), replace(book, low=[[256, *book.low[0][1:]]])):
        with pytest.raises(PaleyError, match="bad argument"):
            matmul.prepare(replace(q, grid=replace(q.grid, codebook=broken)), scheme)


@pytest.mark.parametrize("grid", ["gauss3", "int4", "p2n4096", "p2n256", "free2", "gauss5"])
@pytest.mark.parametrize("inputs", ["int4", "gauss4", "uint4", "int8", "gauss3", "uint8", "gauss8"])
@pytest.mark.parametrize("groups", [(None, None), (64, 32), (32, 96), (96, None), (60, 30)])
def test_inputs_of_a_scheme_keep_its_codes(grid: str, inputs: str, groups: tuple[int | None, int | None]) -> None:
    scheme = scheme_of(grid, groups[0], ActivationScheme(inputs, group_size=groups[1]))
    width = 2 * math.lcm(groups[0] or 1, groups[1] or 1, 60)
    check(scheme, 20, width, 5)
    made = matmul.plan(scheme, width)
    assert made is not None
    if inputs in ("int4", "gauss4", "uint4", "gauss3", "int8"):
        assert made.map is not None


def test_codes_of_a_scheme_are_exact() -> None:
    scheme = scheme_of("int4", None, ActivationScheme("uint4", group_size=64))
    q = weight_of(scheme, 8, 256)
    matrix = matmul.prepare(q, scheme)
    x = torch.randn(3, 256)
    got = decoded(matmul.encode(x, matrix, scheme), matrix.plan, 3, 256, None)
    assert torch.equal(got.float(), round_input(x, scheme))


@pytest.mark.parametrize(
    "transform", [Transform(96, 96, 12, 3), Transform(100, 128, 128, None), Transform(60, 60, 20, 1)]
)
@pytest.mark.parametrize("inputs", [None, ActivationScheme("gauss4", "rms")])
def test_transforms(transform: Transform, inputs: ActivationScheme | None) -> None:
    check(scheme_of("p2n64", None, inputs, transform=transform), 19, transform.out_dim, 5)


@pytest.mark.parametrize("grid", ["p2n256", "gauss4", "trellis4", "uint4"])
def test_turned_inputs_share_a_scale_of_many_columns(grid: str) -> None:
    """Segments of 192 and 256 columns, the last one shorter; tokens and rows fill tiles, or do not."""
    for width, order in ((576, 576), (1024, 1024), (1120, 160)):
        scheme = scheme_of(grid, None, None, transform=Transform(width, width, order, 1))
        made = matmul.plan(scheme, width)
        assert made is not None
        assert made.segment == {576: 192, 1024: 256, 1120: 192}[width]
        for rows, tokens in ((40, 50), (112, 32), (16, 16)):
            check(scheme, rows, width, tokens)


@pytest.mark.parametrize(
    "inputs", [None, ActivationScheme("int4"), ActivationScheme("uint8"), ActivationScheme("gauss4", "rms")]
)
@pytest.mark.parametrize("grid", ["gauss4", "uint4", "int8", "gauss6"])
def test_outliers(inputs: ActivationScheme | None, grid: str) -> None:
    check(scheme_of(grid, 32, inputs, outliers=5), 21, 160, 3)
    check(scheme_of(grid, 32, inputs, outliers=5), 53, 160, 37)
    check(scheme_of(grid, None, inputs, outliers=70, transform=Transform(120, 120, 12, 1)), 21, 120, 1)


def test_infinite_inputs_stay_what_they_are() -> None:
    scheme = scheme_of("int4")
    matrix = matmul.prepare(weight_of(scheme, 4, 128), scheme)
    x = torch.zeros(3, 128)
    x[0, 5], x[1, 100] = math.inf, math.nan
    y = matmul.matmul(matmul.encode(x, matrix, scheme), 3, matrix)
    assert y[:2].isnan().all()
    assert not y[2].any()


def test_what_does_not_fit_is_refused() -> None:
    scheme = scheme_of("int4", 32)
    matrix = matmul.prepare(weight_of(scheme, 4, 64), scheme)
    with pytest.raises(PaleyError, match="float32 \\[tokens, 64\\]"):
        matmul.encode(torch.zeros(2, 63), matrix, scheme)
    inputs = matmul.encode(torch.zeros(2, 64), matrix, scheme)
    with pytest.raises(PaleyError, match="bad argument"):
        matmul.matmul(inputs, 3, matrix)
    with pytest.raises(PaleyError, match="none of"):
        matmul.matmul(inputs, 2, matrix, level="sse9")
    for at in (0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 48):
        blob = matrix.blob.clone()
        blob[at] ^= 0x41
        with pytest.raises(PaleyError, match="bad argument"):
            matmul.matmul(inputs, 2, replace(matrix, blob=blob))
    with pytest.raises(PaleyError, match="bad argument"):
        matmul.matmul(inputs, 2, replace(matrix, blob=matrix.blob[:-1]))


def test_an_instruction_set_is_chosen_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for level in matmul.levels():
        monkeypatch.setenv("PALEY_ISA", level)
        assert matmul.best_level() == level
    for missing in ("sse9", next(level for level in matmul.LEVELS if level and level not in matmul.levels())):
        monkeypatch.setenv("PALEY_ISA", missing)
        with pytest.raises(PaleyError, match=f"does not have that level, got {missing}; unset it"):
            matmul.best_level()
