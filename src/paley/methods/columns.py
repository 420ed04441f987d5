"""Rounds a block of columns, one code after the other: GPTQ's error feedback, and coordinate descent.

Every float32 operation is rounded by itself, in one order, so that the native loops (`paley.kernels.columns`), which
run wherever they can, give the same codes as the torch code here.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from paley import kernels
from paley.kernels import columns as kernel
from paley.methods.codebooks import Codebook, Rounding

__all__ = ["descent", "feedback", "follow_", "inverses"]

_LOG = logging.getLogger(__name__)


def feedback(weights: Tensor, spread: Tensor, book: Codebook, start: int) -> tuple[Tensor, Tensor]:
    """weights [out, k]: the columns of `book` from `start` on -> codes [out, ceil(k / p)] and errors [out, k].

    spread [k, k], upper triangular: a column's error, divided by the diagonal, changes those after it by its row. The
    columns of one code are rounded together: the feedback between them is taken out of their errors.
    """
    if (rounding := _native(weights, book, start)) is not None:
        codes, errors = kernel.feedback(weights, spread, _table(rounding), rounding.scales, rounding.zeros)
        return codes.to(book.code_dtype), errors
    work, errors, codes = weights.clone(), torch.empty_like(weights), []
    for cols in _codes(book.p, weights.shape[1]):
        code, values = book.nearest(work[:, cols], slice(start + cols.start, start + cols.stop))
        codes.append(code)
        error, own = errors[:, cols], spread[cols, cols]
        error.copy_(work[:, cols] - values)
        for i in range(error.shape[1]):
            for k in range(i):
                error[:, i] -= error[:, k] * own[k, i]
            error[:, i] /= own[i, i]
        for i, column in enumerate(error.unbind(1), cols.start):
            work[:, cols.stop :] -= column[:, None] * spread[i, cols.stop :]
    return torch.stack(codes, -1), errors


def descent(
    pull: Tensor, gram: Tensor, inverse: Tensor, codes: Tensor, book: Codebook, start: int
) -> tuple[Tensor, Tensor]:
    """Each code in turn becomes the best one, all others as they are -> new codes, and how far values move [out, k].

    pull [out, k]: (target - values) G at the columns of `book` from `start` on; gram [k, k]: their part of G; inverse:
    `inverses(gram, p)`; codes [out, ceil(k / p)]. The objective never rises.
    """
    if (rounding := _native(pull, book, start)) is not None:
        table, scales, zeros = _table(rounding), rounding.scales, rounding.zeros
        new_codes, moves = kernel.descent(pull, gram, inverse, codes, table, scales, zeros)
        return new_codes.to(book.code_dtype), moves
    near, moves, codes = pull.clone(), torch.zeros_like(pull), codes.clone()
    for index, cols in enumerate(_codes(book.p, pull.shape[1])):
        place, own, force = slice(start + cols.start, start + cols.stop), gram[cols, cols], near[:, cols]
        old = book.values(codes[:, index : index + 1], place)
        best = old.clone()
        for k, column in enumerate(force.unbind(1)):
            best += column[:, None] * inverse[index, k, : best.shape[1]]
        code, values = book.nearest(best, place)
        move = values - old
        slope = 2 * force
        for k, column in enumerate(move.unbind(1)):
            slope -= column[:, None] * own[k]
        gain = torch.zeros_like(move[:, 0])
        for i in range(move.shape[1]):
            gain += slope[:, i] * move[:, i]
        better = gain > 0  # the nearest point is not always the best in the metric of `own`
        codes[:, index] = torch.where(better, code, codes[:, index])
        moves[:, cols] = torch.where(better[:, None], move, 0)
        for i, column in enumerate(moves[:, cols].unbind(1), cols.start):
            near[:, cols.stop :] -= column[:, None] * gram[i, cols.stop :]
    return codes, moves


def follow_(pull: Tensor, moves: Tensor, gram: Tensor) -> None:
    """pull [out, in] -= moves [out, k] @ gram [k, in], in place, one column of moves after the other."""
    if pull.device.type != "cpu":
        pull.addmm_(moves, gram, alpha=-1)
        return
    if kernels.backend() == "native":
        kernel.follow_(pull, moves, gram)
        return
    for column, row in zip(moves.unbind(1), gram, strict=True):
        if column.any():
            pull -= column[:, None] * row


def inverses(gram: Tensor, p: int) -> Tensor:
    """gram [k, k] -> the inverses of its diagonal blocks of p columns, float32 [ceil(k / p), p, p]."""
    missing = -len(gram) % p
    whole = torch.block_diag(gram, torch.eye(missing).to(gram)).double()
    blocks = whole.unflatten(0, (-1, p)).unflatten(2, (-1, p)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    return torch.linalg.inv(blocks).float().contiguous()


def _native(x: Tensor, book: Codebook, start: int) -> Rounding | None:
    """How the kernels round the columns of x; None if they cannot."""
    if x.device.type != "cpu" or kernels.backend() != "native":
        return None
    rounding = book.rounding(start, x.shape[1])
    if rounding is not None and (rounding.grid is None or rounding.grid.p <= kernel.MAX_DIM):
        return rounding
    _say_misfit(book.p)
    return None


def _table(rounding: Rounding) -> kernel.Table:
    if rounding.points is not None:
        return kernel.Table.of_rows(rounding.points)
    assert rounding.grid is not None
    return kernel.table_of(rounding.grid)


@functools.cache
def _say_misfit(p: int) -> None:
    _LOG.info("no native loops for codes of %d values, only for tables of up to %d; PyTorch runs", p, kernel.MAX_DIM)


def _codes(p: int, columns: int) -> Iterator[slice]:
    """The columns of each code."""
    for first in range(0, columns, p):
        yield slice(first, min(first + p, columns))
