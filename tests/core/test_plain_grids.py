"""Grids as plain data: a name or the points, read strictly; copies and pickles are of the name or the points too."""

import copy
import pickle

import pytest
import torch

from paley.core import free, grids, lattice
from paley.core.errors import PaleyError
from paley.core.plain_grids import from_plain, to_plain, with_points
from paley.core.schemes import ActivationScheme, WeightScheme

OWN = grids.custom(torch.randn(9, 2, generator=torch.Generator().manual_seed(0)))
GRIDS = [*map(grids.load, ("int4", "uint3", "gauss2", "nf4", "p2n64", lattice.names()[0], free.names()[0])), OWN]


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
def test_grids_come_back_equal(grid):
    for again in (from_plain(to_plain(grid)), copy.deepcopy(grid), pickle.loads(pickle.dumps(grid)), from_plain(grid)):
        assert again == grid
        assert hash(again) == hash(grid)
    assert to_plain(grid) == (grid.name if grid.packaged else {"points": grid.points.tolist()})
    assert sum(grid == other for other in GRIDS) == 1


def test_tables_are_not_pickled():
    assert len(pickle.dumps(WeightScheme("p4n4096", scale_search="rms"))) < 300


@pytest.mark.parametrize("name", ["int4", "p1n9", "free2", "mirror4"])
def test_the_points_of_a_group_are_what_its_codes_stand_for(name):
    grid, g = grids.load(name), torch.Generator().manual_seed(0)
    scales = torch.rand(5, 3, *grid.scale_shape, generator=g).sort(-1).values
    codes = torch.arange(grid.size).repeat(3).expand(5, -1)
    assert torch.equal(grid.group_points(scales).flatten(1), grid.dequantize(codes, scales))


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("imt4", "unknown grid 'imt4'.*did you mean 'int4'"),
        (4, r"must be a grid's name, or \{points: .*, got 4"),
        (None, "must be a grid's name, .*got None"),
        ({"point": []}, "unknown key 'point'; did you mean 'points'"),
        ({}, "points: must be a list of lists of numbers"),
        ({"points": [1.0, 2.0]}, "points: must be a list of lists of numbers"),
        ({"points": [[1.0], ["2"]]}, "points: must be numbers, got '2'"),
        ({"points": [[1.0], [True]]}, "points: must be numbers, got True"),
        ({"points": [[1.0], [2.0, 3.0]]}, "points: must be lists of equal length"),
        ({"points": []}, "points: must be lists of equal length"),
        ({"points": [[1.0], [float("nan")]]}, "points: holds NaN or infinite points"),
        ({"points": [[1.0], [1e300]]}, "points: holds NaN or infinite points"),
        ({"points": [[1.0], [10**400]]}, "points: must be numbers that float32 can hold"),
        ({"points": [[1.0], [1.0]]}, "points: holds the same point twice"),
    ],
)
def test_other_values_are_refused(value, complaint):
    with pytest.raises(PaleyError, match=complaint):
        from_plain(value)


@pytest.mark.parametrize("named", [[], {"int4": [[0.0], [1.0]]}, {OWN.name: [[0.0], [1.0]]}, {OWN.name: 3}])
def test_names_that_are_not_those_of_their_points_are_refused(named):
    with pytest.raises(PaleyError, match=r"plan\.json: grids: "):
        with_points({"grids": named}, "plan.json")


def test_names_become_points_only_where_a_grid_is_meant():
    points = OWN.points.tolist()
    data = {"grids": {OWN.name: points}, "a": [{"grid": OWN.name, "group": OWN.name}], "grid": "int4"}
    found = with_points(data, "plan.json")
    assert found == {"a": [{"grid": {"points": points}, "group": OWN.name}], "grid": "int4"}
    assert with_points({"a": OWN.name}, "plan.json") == {"a": OWN.name}


def test_inputs_take_no_free_grid_whatever_it_is_given_as():
    for grid in ("free2", grids.load("free2")):
        with pytest.raises(PaleyError, match="grid 'free2' is for weights"):
            ActivationScheme(grid)
