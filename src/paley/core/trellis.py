"""Trellis-coded grids (TCQ; QTIP, arXiv:2406.11235): a value depends on its code and on those before it in the row.

A code of b bits and the bits of the codes before it, STATE_BITS in all, make a state, and each state has p values. A
value is one of 256 integers, of which 128 are the others times -1. Its place among them is the sum, modulo 256, of what
two short lists have for the lower and the upper half of the state, so that a processor finds 64 values with a few
permutations of bytes. The search for the best row of codes (Viterbi) comes to within .6 dB of Shannon's bound at two
bits, where the best table of vectors is 1.9 dB off. A row is a ring: what comes before its first code is its last one.
Nothing is stored but the codes.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import resources
from typing import ClassVar

import torch
from torch import Tensor

from paley.core.errors import PaleyError, nearest_name
from paley.core.fixed import Fixed

__all__ = [
    "HALF_BITS",
    "KEEP",
    "STATE_BITS",
    "Codebook",
    "TrellisGrid",
    "load",
    "names",
    "reference",
    "reference_values",
]

STATE_BITS = 12
HALF_BITS = 6
KEEP = 480  # codes decided at a time, of a search without feedback
REACH = 4.5  # greatest value that the table of costs has a level for; one of 150,000 Gaussian values is beyond
FARTHEST = 3840  # greatest level
USUAL_COST = 2  # of an error of usual size
MOST_COST = 2**8 - 1  # of the table, which stands for more, too
MOST_SQUARE = 2**30  # sum of squared distances of levels, which none of a path from where the row starts comes near
_BYTES = 2**26  # of the PyTorch code's memory, about
_TILE = 2**20  # codes decoded at a time


@dataclass(frozen=True)
class Codebook:
    """low, high [p][64]: by a state's lower and upper half, 0 to 255. points [128]: of places 0 to 127, within 127.

    Place 255 - q has the point of place q times -1.
    """

    low: list[list[int]]
    high: list[list[int]]
    points: list[int]

    @functools.cached_property
    def values(self) -> Tensor:
        """int64 [p, 2^STATE_BITS]: the integers of each state."""
        low, high = torch.tensor(self.low), torch.tensor(self.high)
        points = torch.tensor(self.points)
        return torch.cat([points, -points.flip(0)])[(high[:, :, None] + low[:, None, :]).flatten(1) % 256]

    def lists(self) -> Tensor:
        """int64 [384], as kernels read them: low and high of the first value, of the second, and the points."""
        zeros = [0] * 2**HALF_BITS
        of_values = [x for pair in zip(self.low, self.high, strict=True) for part in pair for x in part]
        return torch.tensor([*of_values, *zeros * (4 - 2 * len(self.low)), *self.points])


@dataclass(frozen=True)
class TrellisGrid(Fixed):
    """bits_per_code: b. step_size: what the integers of `codebook` are multiplied by.

    mse: t2 = E|x - round(x)|^2 on rows of 1024 values of N(0, 1).
    """

    name: str
    bits_per_code: int
    values_per_code: int
    step_size: float
    mse: float
    codebook: Codebook = field(repr=False, compare=False)

    sequential: ClassVar[bool] = True
    points: ClassVar[None] = None  # the table is of states
    affine: ClassVar[bool] = False
    unit: ClassVar[bool] = True
    gaussian: ClassVar[bool] = True
    packaged: ClassVar[bool] = True
    best_scaled: ClassVar[bool] = True
    step: ClassVar[float | None] = None
    gaussian_scale: ClassVar[float] = 1.0

    @property
    def p(self) -> int:
        return self.values_per_code

    @property
    def size(self) -> int:
        return 2**self.bits_per_code

    @property
    def bits(self) -> float:
        return self.bits_per_code / self.p

    @property
    def peak(self) -> float:
        return float(self.table.abs().max())

    @property
    def memory(self) -> int:
        """How many codes make a state."""
        return -(-STATE_BITS // self.bits_per_code)

    @property
    def ahead(self) -> int:
        """How many codes more are looked at before one is decided: paths have met by then."""
        return 5 * self.memory

    @functools.cached_property
    def table(self) -> Tensor:
        """float32 [p, 2^STATE_BITS]: the values of each state."""
        return self.codebook.values.float() * self.step_size

    @property
    def usual_error(self) -> float:
        """About the root mean square, in the codebook's integers."""
        return 1.1 * 2**-self.bits / self.step_size

    @property
    def fineness(self) -> int:
        """Levels of an integer: what is searched for is rounded to them."""
        return 2 if self.usual_error < 4 else 1

    @property
    def search_scale(self) -> float:
        """Levels of the value 1."""
        return torch.tensor(self.fineness / self.step_size, dtype=torch.float32).item()

    @functools.cached_property
    def levels(self) -> Tensor:
        """int32 [p, 2^STATE_BITS]: the values of each state in levels."""
        return (self.codebook.values * self.fineness).int()

    @functools.cached_property
    def costs(self) -> Tensor:
        """uint8 [p, levels, 2^STATE_BITS]: squared errors of each state's values, a usual one as USUAL_COST."""
        reach = round(REACH * self.search_scale)
        off = torch.arange(-reach, reach + 1, dtype=torch.int32)[:, None] - self.levels[:, None]
        of_one = max(1, round((self.fineness * self.usual_error) ** 2 / USUAL_COST))
        return off.square_().mul_(2).add_(of_one).div_(2 * of_one, rounding_mode="floor").clamp_(max=MOST_COST).byte()

    def check_width(self, width: int, where: str) -> None:
        """Raises for rows too short to close the ring."""
        if -(-width // self.p) < self.memory:
            raise PaleyError(
                f"{where}: rows of {width} values are too short for grid {self.name!r}, which needs "
                f"{self.memory * self.p}; set another grid, such as p2n{2 ** min(12, round(2 * self.bits))}"
            )

    def nearest(self, vectors: Tensor) -> Tensor:
        """vectors [N, p], those of one row -> codes [N] of least squared error."""
        return self.search(vectors.flatten()[None])[0]

    def quantize(self, groups: Tensor, scales: Tensor, zeros: Tensor | None = None) -> Tensor:
        vectors = self.vectors(groups, scales, zeros)
        rows = vectors.flatten(-2)
        return self.search(rows.reshape(-1, rows.shape[-1])).view(vectors.shape[:-1])

    def search(self, x: Tensor) -> Tensor:
        """x [rows, n] -> codes [rows, n / p] of least squared error, each row a ring."""
        self.check_width(x.shape[1], "trellis")
        ends = self.ring_ends(x)
        codes, _, _ = self.codes(x, x.shape[1], x.new_ones(1, 1).expand_as(x), ends, ends, keep=KEEP, ahead=self.ahead)
        return codes.to(self.code_dtype)

    def ring_ends(self, x: Tensor) -> Tensor:
        """x [rows, n], scaled -> int32 [rows]: good states for the end of each row, which is also before its start."""
        near = min(self.ahead, x.shape[1] // self.p) * self.p
        last = x.shape[1] // self.p * self.p - near  # a ragged last code counts as none here
        around = torch.cat([x[:, last : last + near], x[:, :near]], 1)
        free = torch.full((len(x),), -1, dtype=torch.int32, device=x.device)
        ones = around.new_ones(1, 1).expand_as(around)
        return self.codes(around, near, ones, free, None, keep=near // self.p, ahead=self.ahead)[1]

    def codes(
        self, x: Tensor, columns: int, scales: Tensor, states: Tensor, ends: Tensor | None, *,
        keep: int, ahead: int, spread: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Rounds the first `columns` of x [rows, wide] -> codes [rows, c], states after them, errors [rows, columns].

        scales [rows, wide]. states int32 [rows]: those before the first column; -1: any. ends: those wanted after the
        last of `wide`. keep: codes decided at a time, with a look at `ahead` more, at least `memory`. spread [columns,
        wide], as in GPTQ: errors change the columns to come; without it there are none, [rows, 0].
        """
        return torch.ops.paley.trellis_codes(
            x,
            columns,
            scales,
            self.table.to(x.device),
            self.levels.to(x.device),
            self.costs.to(x.device),
            self.search_scale,
            self.bits_per_code,
            states,
            ends,
            spread,
            keep,
            ahead,
        )

    def decode(self, codes: Tensor) -> Tensor:
        """codes, integers [..., c], whole rows -> values float32 [..., c, p]."""
        rows = codes.reshape(-1, codes.shape[-1])
        return torch.ops.paley.trellis_values(rows, self.table.to(codes.device), self.bits_per_code).view(
            *codes.shape, self.p
        )

    def round(self, vectors: Tensor) -> Tensor:
        """vectors [N, p], those of one row -> `decode(nearest(vectors))`."""
        return self.decode(self.nearest(vectors))


@functools.cache
def _data() -> dict:
    return json.loads(resources.files("paley.core").joinpath("tables/trellis.json").read_text(encoding="utf-8"))


def names() -> list[str]:
    """Names of the packaged grids, by bits."""
    return list(_data()["grids"])


@functools.cache
def load(name: str) -> TrellisGrid:
    """'trellis2.5' -> 2.5 bits: codes of 5 bits for 2 values; PaleyError for other names."""
    if name not in names():
        raise PaleyError(f"unknown grid {name!r}: packaged are {', '.join(names())}{_neighbours(name)}")
    entry = _data()["grids"][name]
    codebook = Codebook(entry["low"], entry["high"], entry["points"])
    return TrellisGrid(name, entry["bits"], entry["p"], entry["step"], entry["t2"], codebook)


def _neighbours(name: str) -> str:
    """What an unknown name's rate lies between, or a name that is spelled like it."""
    rate = re.fullmatch(r"trellis(\d+(?:\.\d+)?)", name)
    if rate is None:
        return nearest_name(name, names())
    bits, by_bits = float(rate[1]), sorted(names(), key=lambda known: load(known).bits)
    above = next((known for known in by_bits if load(known).bits >= bits), by_bits[-1])
    below = by_bits[max(by_bits.index(above) - 1, 0)]
    if not load(below).bits < bits < load(above).bits:
        return f"; the nearest is {above}"
    return f"; {bits:g} bits lie between {below} and {above}, which a budget of {bits:g} bits a weight mixes"


def reference(
    x: Tensor, columns: int, scales: Tensor, table: Tensor, levels: Tensor, costs: Tensor, unit: float,
    bits: int, states: Tensor, ends: Tensor | None, spread: Tensor | None, keep: int, ahead: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`TrellisGrid.codes` in plain torch. Each float32 operation is rounded by itself, in one order."""
    size = table.shape[1]
    few = max(1, _BYTES // (2 * (keep + ahead) * (size >> bits) + 16 * size))
    parts = [
        _some_rows(
            x[rows], columns, scales[rows], table, levels, costs, unit, bits, states[rows],
            None if ends is None else ends[rows], spread, keep, ahead,
        )
        for rows in (slice(start, start + few) for start in range(0, max(len(x), 1), few))
    ]  # fmt: skip
    codes, after, errors = (torch.cat(part) for part in zip(*parts, strict=True))
    return codes, after, errors


def reference_values(codes: Tensor, table: Tensor, bits: int) -> Tensor:
    """`TrellisGrid.decode` of codes [rows, c], in plain torch -> float32 [rows, c, p]."""
    p, size = table.shape
    values = torch.empty(*codes.shape, p, device=codes.device)
    few = max(1, _TILE // max(1, codes.shape[1]))
    for some, out in zip(codes.split(few), values.split(few), strict=True):
        latest, state = some.int(), torch.zeros_like(some, dtype=torch.int32)
        for back in range(-(-(size.bit_length() - 1) // bits)):
            state |= latest.roll(back, -1) << (back * bits)
        state &= size - 1
        for i, of_states in enumerate(table):
            out[..., i] = of_states[state]
    return values


def _some_rows(
    x: Tensor, columns: int, scales: Tensor, table: Tensor, levels: Tensor, costs: Tensor, unit: float,
    bits: int, states: Tensor, ends: Tensor | None, spread: Tensor | None, keep: int, ahead: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    p, wide = len(table), x.shape[1]
    steps, all_steps = -(-columns // p), -(-wide // p)
    work, errors, codes = x.clone(), x.new_zeros(len(x), columns if spread is not None else 0), []
    for start in range(0, steps, keep):
        stop = min(start + keep, steps)
        end = min(stop + ahead, all_steps)
        here = slice(start * p, min(end * p, wide))
        y = torch.nn.functional.pad(work[:, here] / scales[:, here], (0, end * p - here.stop)).unflatten(1, (-1, p))
        y = (y * unit).nan_to_num(nan=-FARTHEST).clamp(-FARTHEST, FARTHEST).round().int()
        last = ends if end == all_steps else None
        path = _viterbi(y, levels, costs, bits, states, last)[:, : stop - start]
        codes.append(path & (2**bits - 1))
        states = path[:, -1]
        if spread is not None:
            first, last = start * p, min(stop * p, columns)
            values = table[:, path].permute(1, 2, 0).flatten(1)[:, : last - first] * scales[:, first:last]
            for i in range(first, last):
                e = work[:, i] - values[:, i - first]
                for k in range(first, i):
                    e = e - errors[:, k] * spread[k, i]
                errors[:, i] = e / spread[i, i]
            for i in range(first, last):
                work[:, last:] -= errors[:, i, None] * spread[i, last:]
    return torch.cat(codes, 1).int(), states.int(), errors


def _viterbi(
    y: Tensor, levels: Tensor, costs: Tensor, bits: int, states: Tensor, ends: Tensor | None
) -> Tensor:  # fmt: skip
    """Levels y int32 [rows, steps, p] -> states int64 [rows, steps] of the path of least cost, of equal ones the first.

    Costs are those of the table. Sums of MOST_COST and more are not told apart: a row whose path has one, or a level
    that the table lacks, is searched again for the path of least squared distance. Any other path costs no less than
    its sums say, so that one without such a sum is the best.
    """
    reach, overlaps = costs.shape[1] // 2, costs.shape[2] >> bits
    places = (y + reach).clamp(0, 2 * reach)
    listed = ([of[place[:, i]] for i, of in enumerate(costs)] for place in places.unbind(1))
    path, unsure = _path(listed, MOST_COST, overlaps, states, ends)
    if len(rows := (unsure | (y.abs() > reach).any(2).any(1)).nonzero()[:, 0]):
        exact = ([(at[:, i, None] - of).square() for i, of in enumerate(levels)] for at in y[rows].unbind(1))
        path[rows] = _path(exact, MOST_SQUARE, overlaps, states[rows], None if ends is None else ends[rows])[0]
    return path


def _path(
    costs: Iterable[list[Tensor]], most: int, overlaps: int, states: Tensor, ends: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Costs of each step's values [rows, size] -> states int64 [rows, steps]; bool [rows]: has a sum of `most`.

    Greater sums become `most`. After each step the least is taken off all.
    """
    sums = torch.full((len(states), overlaps), most, dtype=torch.int32, device=states.device)
    sums[states < 0] = 0
    sums.scatter_(1, (states.long() % overlaps)[:, None], 0)
    full, chosen, size = [], [], overlaps
    for of_values in costs:
        size = of_values[0].shape[1]
        of_each = sums.repeat_interleave(size // overlaps, 1)
        for cost in of_values:
            of_each = (of_each + cost).clamp(max=most)
        sums, at = of_each.unflatten(1, (-1, overlaps)).min(1)
        full.append(sums >= most)
        chosen.append(at.to(torch.uint8))
        sums = sums - sums.amin(1, keepdim=True)
    overlap = sums.argmin(1) if ends is None else ends.long() % overlaps
    path, unsure = [], torch.zeros_like(states, dtype=torch.bool)
    for of_step, at in zip(reversed(full), reversed(chosen), strict=True):
        unsure |= of_step.gather(1, overlap[:, None])[:, 0]
        state = at.gather(1, overlap[:, None])[:, 0].long() * overlaps + overlap
        path.append(state)
        overlap = state // (size // overlaps)
    return torch.stack(path[::-1], 1), unsure


_LIBRARY = torch.library.Library("paley", "FRAGMENT")
_LIBRARY.define(
    "trellis_codes(Tensor x, int columns, Tensor scales, Tensor table, Tensor levels, Tensor costs, float unit, "
    "int bits, Tensor states, Tensor? ends, Tensor? spread, int keep, int ahead) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define("trellis_values(Tensor codes, Tensor table, int bits) -> Tensor")
_LIBRARY.impl("trellis_codes", reference, "CompositeExplicitAutograd")
_LIBRARY.impl("trellis_values", reference_values, "CompositeExplicitAutograd")
