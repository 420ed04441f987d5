"""The packaged grids against what is recorded of them, what is published, and what makes a grid optimal."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
from importlib import resources
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from paley.core import grids, tables
from paley.core.errors import PaleyError
from paley.core.nearest import reference as nearest_points
from paley.format.checkpoint import read_tensors
from paley.format.header import read_metadata

# t2 of HIGGS, arXiv:2411.17525.
PUBLISHED = {
    "p1n4": 0.1175, "p1n8": 0.0345, "p1n16": 0.0095,
    "p2n16": 0.1074, "p2n64": 0.0297, "p2n88": 0.0220, "p2n256": 0.00776, "p2n1024": 0.00205, "p2n4096": 0.00059,
    "p3n64": 0.1009, "p3n512": 0.0269, "p3n4096": 0.0069,
    "p4n256": 0.0959, "p4n1024": 0.0500, "p4n4096": 0.0255,
}  # fmt: skip
SMALL = ["p1n3", "p1n16", "p2n9", "p2n16", "p2n64", "p3n16", "p3n64", "p4n16", "p4n64"]
SAMPLES = 200_000


@functools.cache
def rounded(name: str) -> tuple[Tensor, Tensor]:
    """Samples of N(0, I) and their nearest points, float64 [SAMPLES, p]."""
    points, _ = tables.gaussian_grid(name)
    x = torch.randn(SAMPLES, points.shape[1], generator=torch.Generator().manual_seed(2**31))
    return x.double(), points[nearest_points(x, points).long()].double()


def normal_floats() -> dict[str, list[float]]:
    return json.loads(resources.files("paley.core").joinpath("tables/normalfloat.json").read_text())["points"]


def mean_and_error(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [N, ...] -> its mean and the mean's standard error."""
    return x.mean(0), x.std(0) / math.sqrt(len(x))


def test_the_packaged_names():
    names = tables.names()
    assert names == sorted(set(names), key=lambda name: [int(part) for part in name[1:].split("n")])
    assert set(PUBLISHED) | {f"p1n{n}" for n in range(2, 17)} <= set(names)
    assert resources.files("paley.core").joinpath("tables/gaussian_grids.safetensors").stat().st_size < 2e6


@pytest.mark.parametrize("name", tables.names())
def test_each_table(name):
    points, t2 = tables.gaussian_grid(name)
    p, n = (int(part) for part in name[1:].split("n"))
    assert points.shape == (n, p)
    assert points.dtype == torch.float32
    assert points.isfinite().all()
    assert points.tolist() == sorted(points.tolist())
    assert len(points.unique(dim=0)) == n
    assert 4 ** -(math.log2(n) / p) < t2 < 1  # above Shannon's bound
    record = tables.record(name)
    assert record["t2"] == t2
    assert record["samples"] == "exact" or (record["samples"] >= 1e7 and 0 < record["stderr"] < 1e-3 * t2)


@pytest.mark.parametrize("name", PUBLISHED)
def test_no_grid_is_worse_than_the_published_one(name):
    assert tables.record(name)["t2"] < 1.01 * PUBLISHED[name]


@pytest.mark.parametrize("name", SMALL)
def test_the_recorded_error_is_measured_again(name):
    x, c = rounded(name)
    t2, error = mean_and_error((x - c).square().mean(1))
    assert abs(t2 - tables.record(name)["t2"]) < 4 * (error + tables.record(name)["stderr"])


@pytest.mark.parametrize("name", SMALL)
def test_each_point_is_the_mean_of_its_cell(name):
    x, c = rounded(name)
    slope, error = mean_and_error((c * (x - c)).sum(1))  # E x·c = E c·c
    assert abs(slope) < 4 * error
    middle, error = mean_and_error(c)  # E c = E x = 0
    assert (middle.abs() < 4.5 * error).all()


@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_more_points_make_less_error_and_more_dimensions_do_at_equal_bits(p):
    sizes = [int(name.split("n")[1]) for name in tables.names() if name.startswith(f"p{p}n")]
    errors = {n: tables.record(f"p{p}n{n}")["t2"] for n in sizes}
    assert list(errors.values()) == sorted(errors.values(), reverse=True)
    for n in sizes if p > 1 else []:
        levels = round(n ** (1 / p))
        if levels**p == n and f"p1n{levels}" in tables.names():
            assert errors[n] < tables.record(f"p1n{levels}")["t2"] * (1 + 1e-3)


@pytest.mark.parametrize("bits", range(2, 9))
def test_scalar_grids_are_those_of_earlier_checkpoints(bits):
    points, t2 = tables.gaussian_grid(f"p1n{2**bits}")
    earlier = grids.load(f"gauss{bits}")
    assert t2 == pytest.approx(earlier.gaussian_mse(1.0), abs=1e-9)
    assert torch.allclose(points.double(), earlier.points, rtol=0, atol=1e-5)


@pytest.mark.parametrize("n", [2, 3, 5, 11, 16])
def test_scalar_points_are_means_of_their_cells_exactly(n):
    points = tables.gaussian_grid(f"p1n{n}")[0][:, 0].double()
    infinity = torch.tensor([torch.inf], dtype=torch.float64)
    e = torch.cat([-infinity, (points[1:] + points[:-1]) / 2, infinity])
    density = torch.exp(-e.square() / 2) / math.sqrt(2 * math.pi)
    assert (points + density.diff() / torch.special.ndtr(e).diff()).abs().max() < 1e-6
    assert (points + points.flip(0)).abs().max() < 1e-7


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_normal_float_is_its_definition(bits):
    points = torch.tensor(normal_floats()[f"nf{bits}"], dtype=torch.float64)
    half = 2 ** (bits - 1)
    tail = (1 / 2 ** (bits + 1) + 1 / (2 ** (bits + 1) - 2)) / 2
    below = torch.special.ndtri(torch.linspace(tail, 0.5, half, dtype=torch.float64))
    above = torch.special.ndtri(torch.linspace(0.5, 1 - tail, half + 1, dtype=torch.float64))
    assert torch.allclose(points, torch.cat([-below / below[0], above[1:] / above[-1]]), rtol=1e-9, atol=1e-12)


def test_four_bit_floats_are_the_published_ones():
    nf4, af4 = normal_floats()["nf4"], normal_floats()["af4"]
    # bitsandbytes stores these as float32, from a tail rounded to seven digits.
    assert nf4[1:4] == pytest.approx([-0.6961928009986877, -0.5250730514526367, -0.39491748809814453], rel=1e-6)
    assert nf4[8:11] == pytest.approx([0.07958029955625534, 0.16093020141124725, 0.24611230194568634], rel=1e-6)
    assert af4[1:4] == pytest.approx([-0.69441008, -0.51243739, -0.3736951], abs=1e-7)
    assert af4[8:11] == pytest.approx([0.04273164, 0.12934483, 0.21961274], abs=1e-7)


@pytest.mark.parametrize("name", ["nf2", "nf3", "nf4", "af3", "af4"])
def test_absmax_grids_hold_their_ends_and_zero(name):
    points = normal_floats()[name]
    n = 2 ** int(name[-1])
    assert len(points) == n
    assert points == sorted(set(points))
    assert (points[0], points[n // 2 - 1], points[-1]) == (-1, 0, 1)


@pytest.mark.parametrize("name", ["af3", "af4"])
def test_abnormal_float_points_are_medians_of_blocks_of_64(name):
    points = torch.tensor(normal_floats()[name])
    x = torch.randn(20_000, 64, generator=torch.Generator().manual_seed(3))
    x = (x / x.abs().amax(1, keepdim=True)).flatten()
    for side in (points[points > 0], -points[points < 0].flip(0)):
        edges = ((side[1:] + side[:-1]) / 2).tolist()
        for low, high, point in zip([0.0, *edges[:-1]], edges, side[:-1].tolist(), strict=True):
            cell = x[(x > low) & (x < high)]
            assert abs((cell < point).float().mean() - 0.5) < 4 * 0.5 / math.sqrt(len(cell))


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("p2n255", r"unknown grid 'p2n255': no such Gaussian grid is packaged; did you mean 'p2n25?"),
        ("p5n16", r"did you mean 'p\dn16'\?$"),
        ("p2n830", r"or make it: python \S+ p2n830 --output p2n830.safetensors, then --grid p2n830.safe"),
        ("__metadata__", r"unknown grid '__metadata__'"),
        ("", r"unknown grid ''"),
    ],
)
def test_unknown_grids_are_refused(name, complaint):
    with pytest.raises(PaleyError, match=complaint):
        tables.gaussian_grid(name)
    with pytest.raises(PaleyError, match=complaint):
        tables.record(name)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """tools/make_gaussian_grids.py."""
    pytest.importorskip("scipy")
    file = Path(__file__).resolve().parents[2] / "tools/make_gaussian_grids.py"
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["p1n4", "p1n12", pytest.param("p2n4", marks=pytest.mark.slow)])
def test_the_script_makes_what_is_packaged(script, name):
    points, record = script.make(*tables.size_of(name))
    packaged, t2 = tables.gaussian_grid(name)
    assert torch.allclose(points, packaged, rtol=0, atol=1e-5)
    assert record == tables.record(name) | {"t2": pytest.approx(t2, rel=1e-5), "stderr": record["stderr"]}


def test_a_grid_of_any_size_goes_to_a_file_of_its_own(script, tmp_path, capsys):
    file = tmp_path / "p1n100.safetensors"
    script.main(["p1n100", "--output", str(file)])
    assert f"written to {file}" in capsys.readouterr().out
    points = read_tensors(file)["points"]
    record = json.loads(read_metadata(file)["grids"])
    assert points.shape == (100, 1)
    assert record["about"]["script"] == "tools/make_gaussian_grids.py"
    assert grids.custom(points).gaussian_mse(1.0) == pytest.approx(record["p1n100"]["t2"], rel=1e-3)
    assert tables.record("p1n64")["t2"] > record["p1n100"]["t2"] > tables.record("p1n128")["t2"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("p2n100", r"p2n100: is not packaged; --output p2n100\.safetensors makes it"),
        ("p2n256 p9n4", "p9n4: no grid of this name can be made"),
        ("p2n1 --output FILE", "p2n1: no grid of this name .* n points from 2 to 4096"),
        ("p2n4097 --output FILE", "p2n4097: no grid of this name"),
        ("p5n16 --output FILE", "p5n16: no grid of this name .* p values from 1 to 4"),
        ("gauss3 --output FILE", "gauss3: no grid of this name"),
        ("--output FILE", "takes one grid a file, got 0"),
        ("p1n4 p1n5 --output FILE", "takes one grid a file, got 2"),
        ("p1n4 --output FILE.npy", r"--grid reads points from \.safetensors files alone"),
        ("p1n4 --output /no/such/folder/g.safetensors", "there is no folder"),
    ],
)
def test_names_that_the_script_cannot_make_are_refused(script, arguments, complaint, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "TABLES", tmp_path)
    arguments = arguments.replace("FILE", str(tmp_path / "g.safetensors")).split()
    with pytest.raises(SystemExit, match=complaint):
        script.main(arguments)
    assert not list(tmp_path.iterdir())
