import pytest
import torch

from paley.core import free, grids
from paley.core.errors import PaleyError
from paley.core.rounding import Quantized, quantize_dynamic, round_trip
from paley.core.schemes import ActivationScheme, AttentionScheme, LinearScheme, WeightScheme


def groups_and_scales(name, rows=5, groups=3, k=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    scales = torch.rand(rows, groups, *free.load(name).scale_shape, generator=g).sort(-1).values
    return torch.randn(rows, groups, k, generator=g), scales


@pytest.mark.parametrize("name", free.names())
def test_codes_are_those_of_the_nearest_points(name):
    grid = grids.load(name)
    x, scales = groups_and_scales(name)
    points = grid.group_points(scales)
    assert points.shape[-1] == grid.size == 2**grid.bits
    assert (points.diff(dim=-1) >= 0).all()
    codes = grid.quantize(x, scales)
    values = grid.dequantize(codes, scales).view_as(x)
    assert torch.equal((values - x).abs(), (x[..., None] - points[..., None, :]).abs().amin(-1))


def test_mirrored_points_are_symmetric():
    _, scales = groups_and_scales("mirror2")
    points = grids.load("mirror2").group_points(scales)
    assert torch.equal(points, -points.flip(-1))
    assert scales.shape[-1] == 2


def test_a_group_is_counted_by_its_points():
    x, scales = groups_and_scales("free2")
    codes = grids.load("free2").quantize(x, scales)
    q = Quantized(codes, scales.half(), None, "free2", 48)
    assert (q.width, q.group_size) == (48, 16)


def test_free_grids_are_for_weights_and_scales_of_their_own():
    for make, complaint in (
        (lambda: ActivationScheme("free2"), "grid 'free2' is for weights"),
        (lambda: WeightScheme("free2"), "needs scale_search 'em' or 'em_diagonal' or 'em_inverse', got 'mse'"),
        (lambda: WeightScheme("int2", scale_search="em"), "needs scale_search 'absmax' or .*, got 'em'"),
        (lambda: LinearScheme(WeightScheme("p2n16", scale_search="rms"), outliers=4), "stands for 2 columns"),
        (lambda: LinearScheme(WeightScheme("p1n4", scale_search="unbiased"), outliers=4), "exclude each other"),
        (lambda: LinearScheme(outliers=4), "but weight is null"),
        (lambda: LinearScheme(WeightScheme("int2"), outliers=-1), "must be at least 0, got -1"),
        (lambda: AttentionScheme(keys=ActivationScheme("uint4", refit=True)), "refit is for linear inputs"),
        (lambda: grids.load("free8"), "free<1-4>"),
    ):
        with pytest.raises(PaleyError, match=complaint):
            make()
    assert [grid.name for grid in grids.family(grids.load("free2"))] == ["free1", "free2", "free3", "free4"]
    assert WeightScheme("free2", 8, scale_search="em_diagonal").on_grid("int3").scale_search == "mse"
    assert WeightScheme("int3", 8).on_grid("mirror2").scale_search == "em"


@pytest.mark.parametrize("grid", ["uint4", "int4", "gauss3"])
def test_refitting_inputs_never_adds_error_and_keeps_constants(grid):
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(1)) + 0.3
    plain, refit = (ActivationScheme(grid, group_size=32, refit=r) for r in (False, True))
    error = [(round_trip(x, s) - x).square().unflatten(-1, (2, 32)).sum(-1) for s in (plain, refit)]
    assert (error[1] <= error[0] + 1e-6).all()
    assert error[1].sum() < 0.97 * error[0].sum()
    constant = torch.full((1, 32), 3.25)
    assert torch.equal(round_trip(constant, ActivationScheme(grid, refit=True)), constant)
    assert torch.equal(round_trip(x, plain), quantize_dynamic(x, plain, torch.float32).dequantize())
