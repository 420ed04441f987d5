"""GPTQ on any scalar grid: rounds column by column and lets later columns make up for the error.

GPTQ: arXiv:2210.17323. Targets that know the inputs are quantized: GPTAQ, arXiv:2504.02692; ours also know what the
residual stream lacks. Afterwards, per row, the scale is refitted and the codes are improved by coordinate descent,
both in the same objective.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paley.core import grids
from paley.core.grids import Grid
from paley.core.rounding import Quantized, dequantize, look_up, nearest_codes, storable
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
    return Quantized(
        codes.flatten(-2),
        scales.squeeze(-1).half(),
        None if zeros is None else zeros.squeeze(-1).to(torch.uint8),
        scheme.grid,
    )


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


def _feedback(
    target: Tensor, gram: Tensor, scales: Tensor, zeros: Tensor | None, grid: Grid, block: int = 128
) -> Tensor:
    """GPTQ proper -> codes [out, groups, group_size]."""
    size = target.shape[1] // scales.shape[1]
    # Upper Cholesky factor of the inverse: its row i spreads column i's error over the columns after it.
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram.double()))
    spread = torch.linalg.cholesky(inverse, upper=True).float()
    work, codes = target.clone(), torch.empty_like(target, dtype=torch.uint8)
    for start in range(0, target.shape[1], block):
        stop = min(start + block, target.shape[1])
        errors = torch.empty_like(work[:, start:stop])
        for col in range(start, stop):
            code, value = _nearest(work[:, col], scales, zeros, grid, col // size)
            codes[:, col] = code
            error = (work[:, col] - value) / spread[col, col]
            work[:, col:stop] -= error[:, None] * spread[col, col:stop]
            errors[:, col - start] = error
        work[:, stop:] -= errors @ spread[start:stop, stop:]
    return codes.unflatten(-1, (scales.shape[1], size))


def _nearest(column: Tensor, scales: Tensor, zeros: Tensor | None, grid: Grid, group: int) -> tuple[Tensor, Tensor]:
    """column [out] -> codes [out] and the values they stand for."""
    scale, zero = scales[:, group], None if zeros is None else zeros[:, group]
    code = nearest_codes(column[:, None], scale, zero, grid)
    return code[:, 0], dequantize(code, scale, zero, grid)[:, 0]


def _refit(target: Tensor, gram: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, grid: Grid) -> Tensor:
    """Scales [out, groups, 1] of least error for the given codes: one group after the other, in closed form."""
    points = look_up(grid, codes)
    if zeros is not None:
        points = points - zeros
    scales, size = scales.clone(), codes.shape[-1]
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
    grid: Grid,
    block: int = 128,
) -> Tensor:
    """One sweep of coordinate descent over the columns: the objective never rises."""
    shape, size = codes.shape, codes.shape[-1]
    codes = codes.flatten(-2).clone()
    values = dequantize(codes, scales.squeeze(-1), None if zeros is None else zeros.squeeze(-1), grid)
    pull = (target - values) @ gram
    for start in range(0, target.shape[1], block):
        stop = min(start + block, target.shape[1])
        near, moves = pull[:, start:stop].clone(), torch.empty_like(pull[:, start:stop])
        for col in range(start, stop):
            col_in_block = col - start
            best = values[:, col] + near[:, col_in_block] / gram[col, col]
            codes[:, col], value = _nearest(best, scales, zeros, grid, col // size)
            moves[:, col_in_block] = value - values[:, col]
            near -= moves[:, col_in_block, None] * gram[col, start:stop]
        pull -= moves @ gram[start:stop]
    return codes.unflatten(-1, shape[1:])
