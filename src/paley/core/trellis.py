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
from dataclasses import dataclass, field
from importlib import resources
from typing import ClassVar

import torch
from torch import Tensor

from paley.core.errors import PaleyError, nearest_name
from paley.core.fixed import Fixed
from paley.core.viterbi import MOST_COST

__all__ = [
    "HALF_BITS",
    "KEEP",
    "STATE_BITS",
    "Codebook",
    "TrellisGrid",
    "load",
    "names",
]

STATE_BITS = 12
HALF_BITS = 6
KEEP = 480  # codes decided at a time, of a search without feedback
REACH = 4.5  # greatest value that the table of costs has a level for; one of 150,000 Gaussian values is beyond
USUAL_COST = 2  # of an error of usual size


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
        return 1 if self.usual_error >= 4 else 2 if self.usual_error >= 1 else 4

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
