"""What a budget chooses among: for each site its candidates, with their errors and the bits that they take.

t^2 of a weight is that of Gaussian values, which rotation makes of it; of keys, values and inputs it is measured
(`model.activation_errors`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from paley.arch import Site
from paley.core import grids, packing, tables, trellis
from paley.core.grids import MAX_DIM, AnyGrid
from paley.core.rounding import codes_per_row
from paley.core.schemes import ActivationScheme, LinearScheme, WeightScheme
from paley.methods.nearest import gaussian_error
from paley.model.activation_errors import Place
from paley.model.problem import Problem
from paley.model.sensitivity import noise_kind
from paley.ops.rounding import round_trip

__all__ = ["KEEP", "Errors", "Item", "gaussian_errors", "items", "kept", "weight_candidates"]

# (place, scheme, width) -> t^2 of the scheme there, on vectors of so many values
Errors = Callable[[Place, ActivationScheme, int], float]

KEEP = "keep"
_SAMPLES = 2**17


@dataclass(frozen=True)
class Item:
    """A site that the budget decides: `places` (module, field) get the scheme that a choice stands for.

    site: what its slope was measured of. values: entries of a weight, values a token of the other kinds.
    bits: stored once for a weight, for each token otherwise. reads: how often a token reads them (a cache: once for
    each token in it). options: what schemes of activations were chosen from.
    """

    name: str
    site: Site
    places: tuple[Place, ...]
    schemes: dict[str, WeightScheme | ActivationScheme | None]
    errors: dict[str, float]
    bits: dict[str, int]
    reads: int = 0
    options: tuple[ActivationScheme, ...] = ()

    @property
    def kind(self) -> str:
        """weight, input, keys or values."""
        return noise_kind(self.site)

    @property
    def values(self) -> int:
        return self.site.numel

    def up_to(self, threshold: float) -> Item:
        """The item with its choices up to an error, or the one of least error."""
        limit = max(threshold, min(self.errors.values()))
        return replace(self, bits={name: bits for name, bits in self.bits.items() if self.errors[name] <= limit})


def items(problem: Problem, errors: Errors, kinds: Collection[str]) -> Iterator[Item]:
    """Every site of these kinds that is quantized, in the order of computation; errors: of no other kinds."""
    schemes, stored = problem.schemes, {site.name for site in problem.sites.weights}
    for site in problem.sites.values():
        kind = noise_kind(site)
        if kind not in kinds:
            continue
        if kind == "input":
            yield from _input_items(problem, site, errors)
        elif kind != "weight":
            yield from _cache_items(problem, site, errors)
        elif site.name in stored and schemes.linears[site.name].weight is not None:
            yield _weight_item(problem, site)


def kept(scheme: LinearScheme) -> LinearScheme:
    """The scheme with its weight unquantized, and without a rotation that has nothing left to serve."""
    transform = None if scheme.input is None else scheme.transform
    return replace(scheme, weight=None, outliers=0, diagonal=False, transform=transform)


def weight_candidates(problem: Problem, scheme: WeightScheme) -> list[AnyGrid | None]:
    """The grids that a weight may get; None: it is kept."""
    budget = problem.budget
    if budget is not None and budget.grids is not None:
        return [None if name == KEEP else grids.load(name) for name in budget.grids]
    family = grids.family(scheme.grid)
    if scheme.grid.sequential:  # between and above their rates there are tables
        most = 2 if scheme.method == "gptq" else MAX_DIM
        return [*family, *(grid for grid in map(grids.load, tables.names()) if grid.p <= most), None]
    linears = problem.schemes.linears.values()
    if scheme.method == "nearest" and any(s.weight is not None and s.weight.grid.sequential for s in linears):
        family = [*family, *map(grids.load, trellis.names())]  # embedding and head beside linears that have them
    packaged = set(tables.names())
    if scheme.method == "nearest" and any(grid.name in packaged for grid in family):
        # Gaussian grids of all dimensions: each meets rates that the others have not, and p = 1 alone has 8 bits.
        family = [*(grid for grid in family if grid.name not in packaged), *map(grids.load, tables.names())]
    return [*family, None]


def gaussian_errors(place: Place, scheme: ActivationScheme, width: int) -> float:
    """Errors of Gaussian vectors, for what was not measured."""
    return _gaussian_error(scheme, width)


def _weight_item(problem: Problem, site: Site) -> Item:
    scheme = problem.schemes.linears[site.name]
    assert scheme.weight is not None
    width = scheme.stored_width(problem.shape(site)[1])
    schemes: dict[str, WeightScheme | ActivationScheme | None] = {}
    errors, bits = {}, {}
    settled = (site.name, "weight") in problem.settled
    candidates = [scheme.weight.grid] if settled else weight_candidates(problem, scheme.weight)
    if scheme.outliers:  # no column of a trellis can be one
        candidates = [grid for grid in candidates if grid is None or not grid.sequential]
    for grid in candidates:
        if grid is None:
            name, chosen = KEEP, kept(scheme)
            errors[name] = 0.0
        else:
            name, chosen = grid.name, replace(scheme, weight=scheme.weight.on_grid(grid))
            assert chosen.weight is not None
            errors[name] = gaussian_error(chosen.weight, width)
        schemes[name] = chosen.weight
        bits[name] = 8 * problem.stored_bytes(site, chosen)
    # Of an embedding that no head shares, a token reads one row.
    reads = 0 if site.kind == "embedding" and not problem.sites.tied else 1
    return Item(site.name, site, ((site.name, "weight"),), schemes, errors, bits, reads)


def _input_items(problem: Problem, site: Site, errors: Errors) -> Iterator[Item]:
    """One item for the linears that read one tensor and round it alike; overrides may set members apart."""
    groups: dict[tuple[ActivationScheme, bool], list[str]] = {}
    for path in site.readers:
        scheme = problem.schemes.linears.get(path)
        if scheme is not None and scheme.input is not None:
            groups.setdefault((scheme.input, (path, "input") in problem.settled), []).append(path)
    for n, ((scheme, _), paths) in enumerate(groups.items()):
        width = problem.schemes.linears[paths[0]].stored_width(site.shape[0])
        places = tuple((path, "input") for path in paths)
        name = f"{site.name}-{n}" if n else site.name
        yield _activation_item(name, site, places, _options(problem, places[0], scheme), width, 1, errors)


def _cache_items(problem: Problem, site: Site, errors: Errors) -> Iterator[Item]:
    place, (heads, width) = (site.module, site.kind), site.shape
    if (scheme := getattr(problem.schemes.attentions[site.module], site.kind)) is not None:
        yield _activation_item(site.name, site, (place,), _options(problem, place, scheme), width, heads, errors)


def _activation_item(
    name: str,
    site: Site,
    places: tuple[Place, ...],
    options: Sequence[ActivationScheme],
    width: int,
    rows: int,
    errors: Errors,
) -> Item:
    """rows vectors of `width` values a token, a scale and a zero point for each group; of a grid the best scheme."""
    bits: dict[str, int] = {}
    best: dict[str, float] = {}
    schemes: dict[str, WeightScheme | ActivationScheme | None] = {}
    for scheme in options:
        grid = scheme.grid
        groups = width // (scheme.group_size or width)
        beside = groups * (16 + 8 * grid.affine)
        bits[grid.name] = rows * (8 * packing.packed_bytes(codes_per_row(width, grid.p), grid.size) + beside)
        error = errors(places[0], scheme, width)
        if grid.name not in best or error < best[grid.name]:
            best[grid.name], schemes[grid.name] = error, scheme
    return Item(name, site, places, schemes, best, bits, options=tuple(options))


def _options(problem: Problem, place: Place, scheme: ActivationScheme) -> list[ActivationScheme]:
    """The scheme with every grid of its grid's family, or itself if an override set it.

    Of keys and values also unclipped: what few bits gain by clipping, many lose.
    """
    if place in problem.settled:
        return [scheme]
    ratios = dict.fromkeys((scheme.clip_ratio, *((1.0,) if place[1] != "input" else ())))
    return [replace(scheme, grid=grid, clip_ratio=ratio) for grid in grids.family(scheme.grid) for ratio in ratios]


@functools.lru_cache(maxsize=256)
def _gaussian_error(scheme: ActivationScheme, width: int) -> float:
    x = torch.randn(-(-_SAMPLES // width), width, generator=torch.Generator().manual_seed(0))
    return float((round_trip(x, scheme) - x).square().mean() / x.square().mean())
