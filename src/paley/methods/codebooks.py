"""Codebooks, to which GPTQ rounds columns: they find the nearest codes, decode them, and refit their scales.

Columns are counted in the order in which GPTQ takes them; outliers come last. A group is a slice of them. It is shorter
than others, or empty, if some of its columns are outliers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from paley.core.grids import AnyGrid, FixedGrid, Grid
from paley.core.rounding import storable
from paley.methods.binary import fit_centroids

__all__ = ["Codebook", "Free", "Rounding", "Scaled", "Split", "blocks"]

_LARGEST = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Rounding:
    """How columns are rounded, as tensors: value = (point - zero) · scale.

    The points are the grid's, or points [out, n] of each row, ascending. scales, zeros [out, columns].
    """

    grid: Grid | None
    points: Tensor | None
    scales: Tensor
    zeros: Tensor | None


class Codebook(Protocol):
    """p: the columns of a code. groups: slices of columns that share scales."""

    p: int
    groups: Sequence[slice]

    @property
    def code_dtype(self) -> torch.dtype: ...

    def begin_(self, work: Tensor, column: int) -> None:
        """Called before `column` is rounded; work [out, in]: the weights as compensated so far."""
        ...

    def nearest(self, x: Tensor, cols: slice) -> tuple[Tensor, Tensor]:
        """x [out, columns of one code] -> its codes [out] and their values, shaped as x."""
        ...

    def values(self, codes: Tensor, cols: slice | None = None) -> Tensor:
        """codes of `cols`, by default of all columns -> the decoded weights [out, columns], float32."""
        ...

    def rounding(self, start: int, columns: int) -> Rounding | None:
        """What `nearest` does in a block of columns; None if its points are no table."""
        ...

    def refit_(self, pull: Tensor, wanted: Tensor, gram: Tensor, codes: Tensor) -> None:
        """The scales of least error in the metric `gram`, one group after the other, in closed form.

        wanted [out, all columns]: target gram. pull: wanted - values gram; it is updated as the values change.
        """
        ...


def blocks(book: Codebook, block: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of runs of whole codes, about `block` columns each. Only runs of vectors may cross groups."""
    columns = book.groups[-1].stop
    wide = max(1, block // book.p) * book.p
    runs = [slice(0, columns)] if book.p > 1 else book.groups
    starts = [start for run in runs for start in range(run.start, run.stop, wide)]
    yield from pairwise([*starts, columns])


class Scaled:
    """A fixed grid with scales and, on affine grids, zeros, [out, groups, 1]."""

    def __init__(self, scales: Tensor, zeros: Tensor | None, grid: FixedGrid, groups: Sequence[slice]):
        self.scales, self.zeros, self.grid, self.groups, self.p = scales, zeros, grid, groups, grid.p
        self._start = groups[0].start
        sizes = torch.tensor([g.stop - g.start for g in groups])
        self._group_of = torch.arange(len(groups)).repeat_interleave(sizes)
        self._group = self._group_of.tolist()

    @property
    def code_dtype(self) -> torch.dtype:
        return self.grid.code_dtype

    def begin_(self, work: Tensor, column: int) -> None:
        """Does nothing: the scales are fixed beforehand."""

    def nearest(self, x: Tensor, cols: slice) -> tuple[Tensor, Tensor]:
        start, stop = cols.start - self._start, cols.stop - self._start
        first, last = self._group[start], self._group[stop - 1]
        of_each = slice(first, first + 1) if first == last else self._group_of[start:stop]
        scales, zeros = self.scales[:, of_each, 0], None if self.zeros is None else self.zeros[:, of_each, 0]
        groups = x[:, None] if first == last else x[..., None]
        codes = self.grid.quantize(groups, scales[..., None], None if zeros is None else zeros[..., None])
        points = self.grid.look_up(codes, x.shape[1])
        return codes[:, 0], (points if zeros is None else points - zeros) * scales

    def values(self, codes: Tensor, cols: slice | None = None) -> Tensor:
        return self._points(codes, cols) * _of_each(self.scales, self._groups_of(cols))

    def rounding(self, start: int, columns: int) -> Rounding | None:
        if self.grid.points is None:
            return None
        groups = self._groups_of(slice(start, start + columns))
        zeros = None if self.zeros is None else _of_each(self.zeros, groups)
        return Rounding(self.grid, None, _of_each(self.scales, groups), zeros)

    def column_scales(self) -> Tensor:
        """[out, columns]: the scale of each column."""
        return _of_each(self.scales, self._group_of)

    def _groups_of(self, cols: slice | None) -> Tensor:
        return self._group_of if cols is None else self._group_of[cols.start - self._start : cols.stop - self._start]

    def _points(self, codes: Tensor, cols: slice | None = None) -> Tensor:
        groups = self._groups_of(cols)
        points = self.grid.look_up(codes, len(groups))
        return points if self.zeros is None else points - _of_each(self.zeros, groups)

    def refit_(self, pull: Tensor, wanted: Tensor, gram: Tensor, codes: Tensor) -> None:
        points, scales = self._points(codes), self.scales.clone()
        for index, cols in enumerate(self.groups):
            p = points[:, cols.start - self._start : cols.stop - self._start]
            # Of a single group, values gram is known: it is what lacks of wanted, and saves a product of matrices.
            along = (wanted - pull) / scales[:, index].clamp(min=1e-30) if p.shape == pull.shape else p @ gram[cols]
            curve = (along[:, cols] * p).sum(-1, keepdim=True)
            slope = (pull[:, cols] * p).sum(-1, keepdim=True) + scales[:, index] * curve
            fitted = storable(slope / curve.clamp(min=1e-30))
            refitted = torch.where((curve > 0) & (slope > 0), fitted, scales[:, index])
            pull -= along * (refitted - scales[:, index])
            scales[:, index] = refitted
        self.scales = scales


class Free:
    """Each group has its own points, fitted to its weights when GPTQ reaches them.

    importance [in]: weights of the squared errors; None: all are equal.
    """

    p = 1
    zeros = None

    def __init__(
        self, rows: int, grid: AnyGrid, groups: Sequence[slice], importance: Tensor | None, where: str = "weight"
    ):
        self.grid, self.groups, self.importance, self.where = grid, groups, importance, where
        self.scales = torch.zeros(rows, len(groups), *grid.scale_shape)
        self._group = [index for index, g in enumerate(groups) for _ in range(g.start, g.stop)]
        self._starts = {g.start: index for index, g in enumerate(groups) if g.stop > g.start}

    @property
    def code_dtype(self) -> torch.dtype:
        return self.grid.code_dtype

    def begin_(self, work: Tensor, column: int) -> None:
        if (index := self._starts.get(column)) is None:
            return
        cols, grid = self.groups[index], self.grid
        importance = None if self.importance is None else self.importance[None, cols]
        self.scales = self.scales.to(work.device)
        self.scales[:, index] = fit_centroids(
            work[:, None, cols], importance, grid.size, mirrored=grid.mirrored, where=self.where
        )[:, 0]

    def nearest(self, x: Tensor, cols: slice) -> tuple[Tensor, Tensor]:
        index = self._group[cols.start]
        scales = self.scales[:, index : index + 1]
        codes = self.grid.quantize(x[:, None], scales)
        return codes[:, 0], self.grid.dequantize(codes, scales)

    def rounding(self, start: int, columns: int) -> Rounding | None:
        points = self.grid.group_points(self.scales[:, self._group[start]])
        return Rounding(None, points, torch.ones(1, 1, device=points.device).expand(len(points), columns), None)

    def values(self, codes: Tensor, cols: slice | None = None) -> Tensor:
        if cols is not None:  # within one group
            index = self._group[cols.start]
            return self.grid.dequantize(codes, self.scales[:, index : index + 1])
        scales = self.scales.split(1, 1)
        parts = [self.grid.dequantize(codes[:, cols], own) for cols, own in zip(self.groups, scales, strict=True)]
        return torch.cat(parts, -1)

    def refit_(self, pull: Tensor, wanted: Tensor, gram: Tensor, codes: Tensor) -> None:
        for index, cols in enumerate(self.groups):
            if cols.stop == cols.start:
                continue
            scales, metric = self.scales[:, index], gram[cols, cols]
            # values = members @ scales: the stored number that each column uses, with its sign
            members = self._members(codes[:, cols])
            curve = members.mT @ (metric @ members)
            slope = (pull[:, None, cols] @ members)[:, 0] + (curve @ scales[..., None])[..., 0]
            free = members.abs().amax(1) == 0  # no column uses this number: it stays
            unit = torch.diag_embed(free.float() + 1e-7 * curve.diagonal(dim1=-2, dim2=-1))
            refitted = torch.linalg.solve(curve + unit, slope + free * scales)
            refitted = refitted.clamp(-_LARGEST, _LARGEST).half().float()
            ascends = (self.grid.group_points(refitted).diff(dim=-1) >= 0).all(-1, keepdim=True)
            refitted = torch.where(ascends, refitted, scales)
            pull -= (members @ (refitted - scales)[..., None])[..., 0] @ gram[cols]
            self.scales[:, index] = refitted

    def _members(self, codes: Tensor) -> Tensor:
        """codes [out, k] -> float32 [out, k, stored]."""
        unit = torch.eye(*self.grid.scale_shape, device=codes.device)
        rows = torch.cat([-unit.flip(0), unit]) if self.grid.mirrored else unit
        return rows[codes.long()]


class Split:
    """One codebook for the first columns, another for the outliers after them; one code for each column."""

    p = 1

    def __init__(self, ordinary: Scaled | Free, outliers: Scaled):
        self.ordinary, self.outliers = ordinary, outliers
        self.groups: Sequence[slice] = [*ordinary.groups, *outliers.groups]
        self._first = outliers.groups[0].start

    @property
    def code_dtype(self) -> torch.dtype:
        return max(self.ordinary.code_dtype, self.outliers.code_dtype, key=lambda dtype: dtype.itemsize)

    def begin_(self, work: Tensor, column: int) -> None:
        self.ordinary.begin_(work, column)

    def nearest(self, x: Tensor, cols: slice) -> tuple[Tensor, Tensor]:
        return (self.ordinary if cols.start < self._first else self.outliers).nearest(x, cols)

    def rounding(self, start: int, columns: int) -> Rounding | None:
        return (self.ordinary if start < self._first else self.outliers).rounding(start, columns)

    def values(self, codes: Tensor, cols: slice | None = None) -> Tensor:
        first = self._first
        if cols is not None:
            return (self.ordinary if cols.start < first else self.outliers).values(codes, cols)
        return torch.cat([self.ordinary.values(codes[:, :first]), self.outliers.values(codes[:, first:])], -1)

    def refit_(self, pull: Tensor, wanted: Tensor, gram: Tensor, codes: Tensor) -> None:
        self.ordinary.refit_(pull, wanted, gram, codes[:, : self._first])
        self.outliers.refit_(pull, wanted, gram, codes[:, self._first :])


def _of_each(scales: Tensor, groups: Tensor) -> Tensor:
    """scales [out, groups, 1] -> those of each column [out, columns]; groups [columns]: the group of each."""
    if bool((groups == groups[0]).all()):
        return scales[:, int(groups[0])].contiguous().expand(-1, len(groups))
    return scales[:, groups, 0]
