"""GPTQ on any grid: rounds the columns of a code and lets later columns make up for the error.

GPTQ: arXiv:2210.17323. Targets that know the inputs are quantized: GPTAQ, arXiv:2504.02692; ours also know what the
residual stream lacks. Afterwards, per row, the scale is refitted and the codes are improved by coordinate descent,
both in the same objective.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from paley.core import grids
from paley.core.grids import AnyGrid, code_dtype
from paley.core.rounding import (
    Quantized,
    codes_per_row,
    dequantize,
    look_up,
    nearest_codes,
    quantized,
    storable,
)
from paley.core.schemes import WeightScheme
from paley.methods.nearest import weight_scales

__all__ = ["InputStatistics", "quantize_gptq"]


class InputStatistics:
    """Second moments of a linear's inputs X [tokens, in], as quantized, with what its output should make up for.

    gram = sum X^T X and cross = sum X_ref^T X [in, in], X_ref the original model's inputs; lag = sum D^T X
    [out, in], D [tokens, out] what the stream that the output is added to lacks already; all float32.
    """

    def __init__(self) -> None:
        self.gram = self.cross = self.lag = torch.zeros(())

    def add(self, inputs: Tensor, reference: Tensor, lag: Tensor | None = None) -> None:
        """inputs, reference [tokens, in], lag [tokens, out]: one batch of each."""
        x = inputs.float()
        self.gram = self.gram + x.T @ x
        self.cross = self.cross + reference.float().T @ x
        if lag is not None:
            self.lag = self.lag + lag.float().T @ x


def quantize_gptq(
    weight: Tensor,
    statistics: InputStatistics,
    scheme: WeightScheme,
    *,
    compensate: bool = True,
    damp: float = 0.01,
    where: str = "weight",
) -> Quantized:
    """weight [out, in] -> the codes that keep the layer's outputs, sum |W x_ref + lag - Ŵ x|^2, small.

    compensate: aim at the original outputs given the quantized inputs; else at W x on those same inputs.
    damp: the share of gram's mean diagonal added to it.
    """
    grid = grids.load(scheme.grid)
    gram, target = _target(weight, statistics, damp, compensate)
    scales, zeros = weight_scales(target, scheme, where)
    codes = _feedback(target, gram, scales, zeros, grid)
    for _ in range(scheme.sweeps):
        scales = _refit(target, gram, codes, scales, zeros, grid)
        codes = _descend(target, gram, codes, scales, zeros, grid)
    return quantized(codes, scales, zeros, grid, weight.shape[1])


def _target(weight: Tensor, statistics: InputStatistics, damp: float, compensate: bool) -> tuple[Tensor, Tensor]:
    """The damped gram matrix G, and the weights of least error before rounding: (W C + L) G^-1, C damped as G.

    With no lag L this is GPTAQ's target; with it, the residual stream as a whole is brought back to the original.
    """
    gram = statistics.gram.double()
    ridge = damp * gram.diagonal().mean().clamp(min=1e-12) * torch.eye(len(gram)).to(gram)
    gram = gram + ridge
    if not compensate:
        return gram.float(), weight.float()
    aim = weight.double() @ (statistics.cross.double() + ridge) + statistics.lag.double()
    return gram.float(), torch.linalg.solve(gram, aim.T).T.float().contiguous()


class _Columns:
    """The columns that one code stands for, p at a time: nearest codes of [out, p] and the values they mean."""

    def __init__(self, scales: Tensor, zeros: Tensor | None, grid: AnyGrid, columns: int):
        """scales, zeros [out, groups, 1]."""
        self.grid, self.columns, self.size = grid, columns, columns // scales.shape[1]
        self.scales, self.zeros = scales.squeeze(-1), None if zeros is None else zeros.squeeze(-1)

    def steps(self, block: int) -> Iterator[tuple[int, int]]:
        """(start, stop) of blocks of columns: whole codes, about `block` of them."""
        wide = max(1, block // self.grid.p) * self.grid.p
        yield from ((start, min(start + wide, self.columns)) for start in range(0, self.columns, wide))

    def codes_in(self, start: int, stop: int) -> Iterator[tuple[int, slice]]:
        """(code's index, its columns) from start to stop."""
        for first in range(start, stop, self.grid.p):
            yield first // self.grid.p, slice(first, min(first + self.grid.p, stop))

    def nearest(self, x: Tensor, cols: slice) -> tuple[Tensor, Tensor]:
        """x [out, columns of one code] -> its codes [out] and their values, shaped as x."""
        first, last = cols.start // self.size, (cols.stop - 1) // self.size
        of_each = slice(first, first + 1) if first == last else torch.arange(cols.start, cols.stop) // self.size
        scales, zeros = self.scales[:, of_each], None if self.zeros is None else self.zeros[:, of_each]
        groups = x[:, None] if first == last else x[..., None]
        codes = nearest_codes(groups, scales[..., None], None if zeros is None else zeros[..., None], self.grid)
        points = look_up(self.grid, codes, x.shape[1])
        return codes[:, 0], (points if zeros is None else points - zeros) * scales


def _feedback(
    target: Tensor, gram: Tensor, scales: Tensor, zeros: Tensor | None, grid: AnyGrid, block: int = 128
) -> Tensor:
    """GPTQ proper, the columns of one code at a time -> codes [out, ceil(in / p)]."""
    columns = _Columns(scales, zeros, grid, target.shape[1])
    # Upper Cholesky factor of the inverse: its row i spreads column i's error over the columns after it.
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram.double()))
    spread = torch.linalg.cholesky(inverse, upper=True).float()
    work = target.clone()
    codes = torch.empty(len(work), codes_per_row(work.shape[1], grid.p), dtype=code_dtype(grid), device=work.device)
    for start, stop in columns.steps(block):
        errors = torch.empty_like(work[:, start:stop])
        for index, cols in columns.codes_in(start, stop):
            codes[:, index], values = columns.nearest(work[:, cols], cols)
            error = work[:, cols] - values
            if grid.p == 1:
                error = error / spread[cols, cols]
            else:  # the columns of one code are rounded together: their errors, freed of each other's feedback
                error = torch.linalg.solve_triangular(spread[cols, cols], error, upper=True, left=False)
            work[:, cols.start : stop] -= error @ spread[cols, cols.start : stop]
            errors[:, cols.start - start : cols.stop - start] = error
        work[:, stop:] -= errors @ spread[start:stop, stop:]
    return codes


def _refit(target: Tensor, gram: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, grid: AnyGrid) -> Tensor:
    """Scales [out, groups, 1] of least error for the given codes: one group after the other, in closed form."""
    points = look_up(grid, codes, target.shape[1]).unflatten(-1, (scales.shape[1], -1))
    if zeros is not None:
        points = points - zeros
    scales, size = scales.clone(), points.shape[-1]
    for group in range(scales.shape[1]):
        cols = slice(group * size, (group + 1) * size)
        p = points[:, group]
        rest = target - (points * scales).flatten(-2)
        rest[:, cols] += p * scales[:, group]
        slope = (rest @ gram[:, cols] * p).sum(-1, keepdim=True)
        curve = (p @ gram[cols, cols] * p).sum(-1, keepdim=True)
        fitted = storable(slope / curve.clamp(min=1e-30))
        scales[:, group] = torch.where((curve > 0) & (slope > 0), fitted, scales[:, group])
    return scales


def _descend(
    target: Tensor,
    gram: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    grid: AnyGrid,
    block: int = 128,
) -> Tensor:
    """One sweep of coordinate descent over the codes: the objective never rises."""
    columns, codes = _Columns(scales, zeros, grid, target.shape[1]), codes.clone()
    values = dequantize(codes, columns.scales, columns.zeros, grid, target.shape[1])
    pull = (target - values) @ gram
    for start, stop in columns.steps(block):
        near, moves = pull[:, start:stop].clone(), torch.zeros_like(pull[:, start:stop])
        for index, cols in columns.codes_in(start, stop):
            cols_in_block = slice(cols.start - start, cols.stop - start)
            own, force = gram[cols, cols], near[:, cols_in_block]
            if grid.p == 1:
                best = values[:, cols] + force / own
            else:
                best = values[:, cols] + torch.linalg.solve(own, force, left=False)
            code, value = columns.nearest(best, cols)
            move = value - values[:, cols]
            if grid.p > 1:  # the nearest point is not always the best in the metric of `own`
                gains = ((2 * force - move @ own) * move).sum(-1) > 0
                code, move = torch.where(gains, code, codes[:, index]), move * gains[:, None]
            codes[:, index] = code
            moves[:, cols_in_block] = move
            near -= move @ gram[cols, start:stop]
        pull -= moves @ gram[start:stop]
    return codes
