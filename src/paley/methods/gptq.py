"""GPTQ on any grid: rounds the columns of a code and changes later columns to make up for the error.

GPTQ: arXiv:2210.17323. Targets for quantized inputs: GPTAQ, arXiv:2504.02692. Our targets also correct the error of the
residual stream. Afterwards each row's scales are refitted, and coordinate descent improves the codes. Both lower the
objective that `paley.methods.statistics` defines.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import linear

from paley.core.errors import PaleyError
from paley.core.grids import as_fixed
from paley.core.rounding import OUTLIER_GRID, Outliers, Quantized, check_groups, joined, quantized
from paley.core.schemes import WeightScheme
from paley.core.trellis import TrellisGrid
from paley.methods.codebooks import Codebook, Free, Scaled, Split, blocks
from paley.methods.columns import descent, feedback, follow_, inverses
from paley.methods.nearest import weight_scales
from paley.methods.statistics import InputStatistics, Metric
from paley.methods.trellis import trellis_feedback

__all__ = ["quantize_gptq"]

_LOG = logging.getLogger(__name__)
VALUES = 2**24  # of a weight's rows that are rounded at a time: 64 MB in each of the tensors at hand
BLOCK = 128  # columns: what is beyond them is changed once a block, by one matmul


def quantize_gptq(
    weight: Tensor,
    statistics: InputStatistics,
    scheme: WeightScheme,
    *,
    outlier_columns: Tensor | None = None,
    share: float = 1.0,
    damp: float = 0.01,
    where: str = "weight",
) -> Quantized:
    """weight [out, in] -> codes for which the sum over tokens of |y - Ŵ x|^2 is small, y the outputs wanted.

    outlier_columns: ascending int32 [k]; they get codes of OUTLIER_GRID, after all others. share: how far to go from
    W x to the outputs that the statistics name, 0 to 1. damp: added to gram's diagonal, as a share of its mean. A
    scheme of method "nearest" uses the statistics only for its scales.
    """
    metric = statistics.metric(damp)
    share = share if scheme.method == "gptq" else 0.0
    order = torch.arange(weight.shape[1], device=weight.device)
    if scheme.method == "gptq" or scheme.scale_search == "em_inverse":
        _check_damping(metric, damp, where)
    importance = _importance(metric, scheme.scale_search) if scheme.needs_data else None
    if outlier_columns is not None:
        chosen = torch.zeros_like(order, dtype=torch.bool).index_fill(0, outlier_columns.long(), True)
        order = torch.cat([order[~chosen], order[chosen]])
        importance = None if importance is None else importance[order]
        metric = metric.ordered(order) if scheme.method == "gptq" else metric
    few, parts = max(1, VALUES // weight.shape[1]), []
    for start in range(0, len(weight), few):
        rows = slice(start, start + few)
        target = statistics.target(weight[rows], damp, share, rows)
        target = target if outlier_columns is None else target[:, order]
        parts.append(_round_rows(target, metric, scheme, order, importance, outlier_columns, where))
    return joined(parts)


def _round_rows(
    target: Tensor, metric: Metric, scheme: WeightScheme, order: Tensor, importance: Tensor | None,
    outlier_columns: Tensor | None, where: str,
) -> Quantized:  # fmt: skip
    """target [out, in], metric, importance: of the columns in `order` -> the codes that come nearest in the metric."""
    grid, columns = scheme.grid, target.shape[1]
    book = _codebook(target, scheme, order, 0 if outlier_columns is None else len(outlier_columns), importance, where)
    if grid.sequential:
        assert isinstance(book, Scaled)
        grid.check_width(columns, where)
        codes = _on_trellis(target, metric, book, scheme)
    elif scheme.method == "nearest":
        codes = _one_by_one(target, book)
    else:
        codes = _feedback(target, metric.spread, book)
        _refine_(codes, target, metric.gram, book, scheme.sweeps)
    if not isinstance(book, Split):
        return quantized(codes, book.scales, book.zeros, grid, columns)
    assert outlier_columns is not None
    ordinary, kept = codes.split([len(order) - len(outlier_columns), len(outlier_columns)], -1)
    placed = torch.zeros_like(codes, dtype=grid.code_dtype).index_copy(-1, order[: ordinary.shape[1]], ordinary)
    rest = quantized(placed, book.ordinary.scales, book.ordinary.zeros, grid, columns)
    own = Outliers(outlier_columns.int(), kept.to(torch.uint8), book.outliers.scales[..., 0].half())
    return replace(rest, outliers=own)


def _check_damping(metric: Metric, damp: float, where: str) -> None:
    """Says for which layer the damping had to be raised, or was not enough."""
    try:
        raised = metric.raised
    except PaleyError as error:
        raise error.at(where) from None
    if raised:
        _LOG.warning(
            "%s: the Hessian is not positive definite; damping raised from %g to %g of its mean diagonal",
            where, damp, damp + raised,
        )  # fmt: skip


def _codebook(
    target: Tensor, scheme: WeightScheme, order: Tensor, outliers: int, importance: Tensor | None, where: str
) -> Scaled | Free | Split:
    """For weights [out, in] with columns in `order`; the last `outliers` are outliers. importance [in]: same order."""
    columns = target.shape[1]
    check_groups(columns, scheme.group_size, where)
    size, count = scheme.group_size or columns, columns - outliers
    ends = [int((order[:count] < end).sum()) for end in range(size, columns + 1, size)]
    groups = [slice(start, stop) for start, stop in zip([0, *ends], ends, strict=False)]
    book: Scaled | Free
    if scheme.by_em:
        book = Free(len(target), scheme.grid, groups, importance, where)
    elif not outliers:
        book = Scaled(*weight_scales(target, scheme, where, importance), as_fixed(scheme.grid), groups)
    else:
        book = Scaled(*_scales_of(target, groups, scheme, importance, where), as_fixed(scheme.grid), groups)
    if not outliers:
        return book
    last = slice(count, columns)
    grid = as_fixed(OUTLIER_GRID)
    own = WeightScheme(grid, scale_search="absmax")
    return Split(book, Scaled(*weight_scales(target[:, last], own, where), grid, [last]))


def _scales_of(
    target: Tensor, groups: Sequence[slice], scheme: WeightScheme, importance: Tensor | None, where: str
) -> tuple[Tensor, Tensor | None]:
    """As `weight_scales`, for groups that may be ragged, or empty if all their columns are outliers."""
    alone = replace(scheme, group_size=None)
    found = []
    for cols in groups:
        empty = cols.stop == cols.start
        part = target.new_zeros(len(target), 1) if empty else target[:, cols]
        found.append(weight_scales(part, alone, where, None if empty or importance is None else importance[cols]))
    scales, zeros = zip(*found, strict=True)
    return torch.cat(scales, 1), None if zeros[0] is None else torch.cat(zeros, 1)


def _importance(metric: Metric, scale_search: str) -> Tensor | None:
    """Weights [in] of the squared errors in the search of scales, or of the points of free grids."""
    if scale_search.endswith("_diagonal"):
        return metric.diagonal
    if scale_search == "em_inverse":
        return metric.inverse_diagonal.square().reciprocal()
    return None


def _feedback(target: Tensor, spread: Tensor, book: Codebook) -> Tensor:
    """GPTQ proper, the columns of one code at a time -> codes [out, ceil(in / p)]. spread: as in Metric."""
    work, codes = target.clone(), []
    for start, stop in blocks(book, BLOCK):
        book.begin_(work, start)
        here, errors = feedback(work[:, start:stop], spread[start:stop, start:stop], book, start)
        codes.append(here)
        work[:, stop:] -= errors @ spread[start:stop, stop:]
    return torch.cat(codes, -1)


def _on_trellis(target: Tensor, metric: Metric, book: Scaled, scheme: WeightScheme) -> Tensor:
    """Codes of a row hang together: after feedback scales are refitted once, and no code descends by itself."""
    grid, scales = book.grid, book.column_scales()
    assert isinstance(grid, TrellisGrid)
    if scheme.method == "nearest":
        return grid.search(target / scales)
    codes = trellis_feedback(target, metric.spread, grid, scales, block=BLOCK)
    if scheme.sweeps:
        wanted, values = linear(target, metric.gram), linear(book.values(codes), metric.gram)
        book.refit_(wanted - values, wanted, metric.gram, codes)
    return codes


def _one_by_one(target: Tensor, book: Codebook) -> Tensor:
    """The nearest codes, without error feedback."""
    codes = []
    for start, stop in blocks(book, 1):
        book.begin_(target, start)
        codes.append(book.nearest(target[:, start:stop], slice(start, stop))[0])
    return torch.stack(codes, -1)


def _refine_(codes: Tensor, target: Tensor, gram: Tensor, book: Codebook, sweeps: int) -> None:
    """Refits the scales and improves the codes, `sweeps` times in turn; both in place."""
    if sweeps == 0:
        return
    wanted = target @ gram
    pull = wanted - book.values(codes) @ gram
    inverse = [inverses(gram[start:stop, start:stop], book.p) for start, stop in blocks(book, BLOCK)]
    for _ in range(sweeps):
        book.refit_(pull, wanted, gram, codes)
        _descend_(pull, gram, inverse, codes, book)


def _descend_(pull: Tensor, gram: Tensor, inverse: Sequence[Tensor], codes: Tensor, book: Codebook) -> None:
    """One sweep of coordinate descent over the codes, in place; pull [out, in], (target - values) gram, follows.

    inverse: of each block, as `columns.inverses` gives it.
    """
    for (start, stop), own in zip(blocks(book, BLOCK), inverse, strict=True):
        here = slice(start // book.p, -(-stop // book.p))
        codes[:, here], moves = descent(
            pull[:, start:stop], gram[start:stop, start:stop], own, codes[:, here], book, start
        )
        follow_(pull, moves, gram[start:stop])
