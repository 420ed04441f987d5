"""Trellis-coded grids: the search finds the best row of codes, a row is a ring, native codes are those of PyTorch."""

import itertools
import math

import pytest
import torch

from paley.core import grids, trellis, viterbi
from paley.core.errors import PaleyError
from paley.core.rounding import Quantized
from paley.core.schemes import ActivationScheme, LinearScheme, WeightScheme
from paley.kernels import native, trellis_codes
from paley.methods.gptq import quantize_gptq
from paley.methods.nearest import gaussian_error, gaussian_spread, quantize_nearest
from paley.methods.statistics import InputStatistics

NAMES = trellis.names()
LEVELS = native.LEVELS[: native.LEVELS.index(native.best_level()) + 1] if native.why_missing() is None else ()


def tables(grid: trellis.TrellisGrid) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    return grid.table, grid.levels, grid.costs, grid.search_scale


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NAMES)
def test_the_error_is_the_one_that_the_table_says(name):
    grid, x = grids.load(name), gaussian(8, 1024)
    error = float((grid.look_up(grid.search(x)) - x).square().mean() / x.square().mean())
    assert error == pytest.approx(grid.mse, rel=0.06)
    assert error > 4**-grid.bits  # Shannon's bound


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_it_is_better_than_any_table_of_vectors(bits):
    tables = [grid for name in grids.names() if (grid := grids.load(name)).gaussian and grid.bits <= bits]
    others = [grid.mse for grid in tables if not grid.sequential and grid.p <= 4]
    assert grids.load(f"trellis{bits}").mse < 0.8 * min(others)


@pytest.mark.parametrize("ends", [None, [3, 0, 6]], ids=["any end", "given ends"])
@pytest.mark.parametrize(
    ("reach", "size"), [(0, 8), (30, 8), (30, 4000)], ids=["by squared distances", "by the table", "greatest levels"]
)
def test_the_path_is_the_best_of_all(reach, size, ends):
    """Against every row of codes, on a small trellis: 4 state bits, codes of one bit."""
    levels = (size * gaussian(1, 16, seed=1)).round().clamp(-viterbi.GREATEST, viterbi.GREATEST).int()
    y = (size * gaussian(3, 6, 1, seed=2)).round().clamp(-viterbi.FARTHEST, viterbi.FARTHEST).int()
    costs = (torch.arange(-reach, reach + 1)[:, None] - levels[:, None]).square().clamp(max=255).to(torch.uint8)
    states = torch.tensor([0, 5, -1], dtype=torch.int32)
    wanted = None if ends is None else torch.tensor(ends, dtype=torch.int32)
    path = viterbi._viterbi(y, levels, costs, 1, states, wanted)
    for row, start, end, found in zip(y[:, :, 0], states.tolist(), ends or [None] * 3, path, strict=True):
        sums = {}
        for begin in range(16) if start < 0 else [start]:
            for codes in itertools.product(range(2), repeat=6):
                state, walked = begin, []
                for code in codes:
                    state = (2 * state + code) % 16
                    walked.append(state)
                if end is None or walked[-1] % 8 == end:
                    sums[tuple(walked)] = int((row - levels[0, walked]).square().sum())
        assert sums[tuple(found.tolist())] == min(sums.values())


def outliers(x: torch.Tensor, grid: trellis.TrellisGrid) -> dict[str, torch.Tensor]:
    """Rows that a search with costs of 8 bits could give values up in."""
    one, many = x.clone(), x.clone()
    one[:, x.shape[1] // 2] = 8
    many[:, ::7] *= 3
    return {
        "gaussian": x, "one far": one, "many far": many, "all far": 2.5 * x, "small": 0.01 * x,
        "steps": torch.where(torch.arange(x.shape[1]) % 64 < 32, 0.05, 4.0) * x.sign(),
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_rounded_as_well_as_exact_costs_would(name):
    """As a table of one level leads to: squared distances of levels."""
    grid = grids.load(name)
    for kind, x in outliers(gaussian(12, 512 * grid.p, seed=7), grid).items():
        ends, ones = grid.ring_ends(x), torch.ones(1, 1).expand_as(x)
        errors = []
        for costs in (grid.costs, torch.full_like(grid.costs[:, :1], 255)):
            how = (x, x.shape[1], ones, grid.table, grid.levels, costs, grid.search_scale, grid.bits_per_code)
            codes, _, _ = torch.ops.paley.trellis_codes(*how, ends, ends, None, trellis.KEEP, grid.ahead)
            errors.append((grid.decode(codes).flatten(1) - x).square().mean(1))
        assert float(errors[0].sum()) <= 1.04 * float(errors[1].sum()), kind
        assert bool((errors[0] <= 1.1 * errors[1]).all()), kind


@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_a_ring(name):
    """The path that the search followed is the one that codes decode to, before the seam and behind it."""
    grid = grids.load(name)
    x = gaussian(3, 12 * grid.memory * grid.p)
    ends, ones = grid.ring_ends(x), torch.ones(1, 1).expand_as(x)
    codes, last, _ = grid.codes(x, x.shape[1], ones, ends, ends, keep=20, ahead=grid.ahead)
    overlap = 2**12 // grid.size
    assert torch.equal(last % overlap, ends % overlap)
    state, path = ends.long(), []
    for code in codes.long().unbind(1):
        state = (state * grid.size + code) % 2**12
        path.append(grid.table[:, state].T)
    assert torch.equal(grid.decode(codes), torch.stack(path, 1))


def test_short_rows_have_no_seam_that_costs():
    grid, x = grids.load("trellis2"), gaussian(512, 48)
    error = float((grid.look_up(grid.search(x)) - x).square().mean() / x.square().mean())
    assert error < 1.1 * grid.mse


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [37, 101, 600])
def test_native_codes_are_those_of_pytorch(name, width):
    grid, x = grids.load(name), gaussian(8, width, seed=width)
    x[5, ::9], x[6, 3], x[6, 20], x[7, 30] = 6.0, math.inf, -math.inf, math.nan
    ends, ones = grid.ring_ends(x), torch.ones(1, 1).expand_as(x)
    how = (x, width, ones, *tables(grid), grid.bits_per_code, ends, ends, None, trellis.KEEP, grid.ahead)
    wanted = viterbi.reference(*how)
    assert torch.equal(grid.search(x).int(), wanted[0])
    for level, threads in itertools.product(LEVELS, (1, 3)):
        for found, expected in zip(trellis_codes.codes(*how, level=level, threads=threads), wanted, strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("rows", "steps"), [(1, 1), (3, 2), (9, 13), (40, 100), (0, 8)])
def test_native_values_are_those_of_pytorch(name, rows, steps):
    """Rows shorter than a state's memory, too: a ring goes around them more than once."""
    grid = grids.load(name)
    codes = torch.randint(grid.size, (rows, steps), generator=torch.Generator().manual_seed(steps)).to(torch.uint8)
    wanted = viterbi.reference_values(codes, grid.table, grid.bits_per_code)
    assert wanted.shape == (rows, steps, grid.p)
    assert torch.equal(grid.decode(codes), wanted)
    for threads in (1, 3):
        assert torch.equal(trellis_codes.values(codes, grid.table, grid.bits_per_code, threads=threads), wanted)


@pytest.mark.parametrize("name", ["trellis1", "trellis2.5", "trellis4"])
@pytest.mark.parametrize(("columns", "wide", "keep"), [(64, 100, 8), (33, 33, 3), (1, 24, 8), (20, 48, 50)])
@pytest.mark.parametrize("spread_of_scales", [0, 1], ids=["one scale", "many scales"])
def test_native_feedback_is_that_of_pytorch(name, columns, wide, keep, spread_of_scales):
    grid, x = grids.load(name), gaussian(5, wide)
    spread = gaussian(columns, wide, seed=1).triu() * 0.1 + torch.eye(columns, wide)
    scales = (spread_of_scales * gaussian(5, wide, seed=2)).exp()
    states = torch.tensor([-1, 0, 7, 4095, 100], dtype=torch.int32)
    ends = torch.arange(5, dtype=torch.int32)
    how = (x, columns, scales, *tables(grid), grid.bits_per_code, states, ends, spread, keep, grid.ahead)
    wanted = viterbi.reference(*how)
    for level, threads in itertools.product(LEVELS, (1, 2)):
        for found, expected in zip(trellis_codes.codes(*how, level=level, threads=threads), wanted, strict=True):
            assert torch.equal(found, expected)


def statistics(width: int) -> InputStatistics:
    found = InputStatistics()
    found.add(gaussian(400, width) @ (torch.eye(width) + 0.3 * gaussian(width, width, seed=1)))
    return found


def loss(weight: torch.Tensor, q: Quantized, found: InputStatistics) -> float:
    off = weight - q.dequantize()
    return float(((off @ found.gram) * off).sum())


@pytest.mark.parametrize(("name", "group"), [("trellis2", None), ("trellis4", 48), ("trellis2.5", None)])
def test_feedback_lowers_the_loss_of_the_outputs(name, group):
    weight, found = gaussian(16, 144, seed=3), statistics(144)
    scheme = WeightScheme(name, group_size=group, scale_search="rms")
    plain, made = quantize_nearest(weight, scheme), quantize_gptq(weight, found, scheme)
    assert loss(weight, made, found) < 0.8 * loss(weight, plain, found)


def test_without_correlations_feedback_is_rounding_to_nearest():
    weight, found = gaussian(4, 200), InputStatistics()
    found.add(torch.eye(200) * 8)
    scheme = WeightScheme("trellis3", scale_search="rms", sweeps=0)
    off = [weight - q.dequantize() for q in (quantize_gptq(weight, found, scheme), quantize_nearest(weight, scheme))]
    assert float(off[0].square().sum()) == pytest.approx(float(off[1].square().sum()), rel=0.05)


def test_the_expected_error_is_that_of_gaussian_weights():
    scheme = WeightScheme("trellis4", method="nearest", scale_search="rms")
    assert gaussian_error(scheme, 512) == pytest.approx(grids.load("trellis4").mse, rel=0.06)
    rows = gaussian(64, 512, seed=5)
    errors = [(row - quantize_nearest(row[None], scheme).dequantize()).square().mean() for row in rows]
    spread = torch.stack(errors).std() / torch.stack(errors).mean() * 512**0.5
    assert gaussian_spread(grids.load("trellis4")) == pytest.approx(float(spread), rel=0.4)


def test_bad_input():
    with pytest.raises(PaleyError, match="rows of 5 values are too short for grid 'trellis2', which needs 6; set"):
        quantize_nearest(gaussian(2, 5), WeightScheme("trellis2", scale_search="rms"))
    with pytest.raises(PaleyError, match="mine: rows of 5 values are too short"):
        quantize_gptq(gaussian(2, 5), statistics(5), WeightScheme("trellis2", scale_search="rms"), where="mine")
    with pytest.raises(PaleyError, match=r"'trellis4.5'.*; 4.5 bits lie between trellis4 and trellis5, which a budget"):
        grids.load("trellis4.5")
    for name, nearest in (("trellis0.5", "trellis1"), ("trellis9", "trellis6"), ("trellis04", "trellis4")):
        with pytest.raises(PaleyError, match=f"'{name}'.*; the nearest is {nearest}$"):
            grids.load(name)
    with pytest.raises(PaleyError, match="made for rows of Gaussian values and needs scale_search 'rms'"):
        WeightScheme("trellis2", scale_search="mse")
    with pytest.raises(PaleyError, match="is for weights: its search is too slow for what is"):
        ActivationScheme("trellis4", scale="rms")
    with pytest.raises(PaleyError, match="set outliers=0"):
        LinearScheme(WeightScheme("trellis4", scale_search="rms"), outliers=2)


@pytest.mark.parametrize("search", [viterbi.reference, trellis_codes.codes], ids=["torch", "native"])
def test_what_cannot_be_searched_is_refused(search):
    grid, x = grids.load("trellis4"), gaussian(2, 30)
    states = torch.tensor([0, 7], dtype=torch.int32)
    given = {
        "x": x, "columns": 30, "scales": torch.ones_like(x), "table": grid.table, "levels": grid.levels,
        "costs": grid.costs, "unit": grid.search_scale, "bits": 4, "states": states, "ends": None, "spread": None,
        "keep": 8, "ahead": 9,
    }  # fmt: skip
    for changes, message in (
        ({"states": states + 4095}, r"states are from -1 to 4095, got \[4095, 4102\]"),
        ({"ends": states - 1}, r"ends are from 0 to 4095, got \[-1, 6\]"),
        ({"ends": states, "ahead": 2}, "ends need a look ahead of 3 codes, got ahead=2"),
        ({"x": x[:, :1], "scales": x[:, :1].exp(), "columns": 1, "ends": states + 100}, r"1 codes do not lead from"),
        ({"costs": grid.costs[:, 1:]}, "an odd number of levels, at most 7681, got 650"),
        ({"levels": grid.levels * 3}, "levels are within 512, got"),
        ({"costs": grid.costs[0]}, r"costs is torch.uint8 \[1, -1, 4096\] on cpu, got torch.uint8 \[651, 4096\]"),
        ({"levels": grid.levels.to("meta")}, "levels is torch.int32 .* on cpu, got .* on meta"),
        ({"keep": 0}, "keep=0"),
        ({"columns": 31}, "columns=31"),
    ):
        with pytest.raises(PaleyError, match=message):
            search(**given | changes)


@pytest.mark.parametrize("search", [viterbi.reference, trellis_codes.codes], ids=["torch", "native"])
@pytest.mark.parametrize(("rows", "columns"), [(0, 30), (3, 0)])
def test_of_nothing_there_are_no_codes(search, rows, columns):
    grid, x, states = grids.load("trellis2.5"), gaussian(rows, 30), torch.arange(rows, dtype=torch.int32)
    ones = torch.ones(1, 1).expand_as(x)
    codes, after, errors = search(x, columns, ones, *tables(grid), 5, states, states, None, 8, 9)
    assert codes.shape == (rows, columns // 2)
    assert errors.shape == (rows, 0)
    assert torch.equal(after, states)
