"""The content of a quantized checkpoint: docs/format.md in code."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from paley.core import packing
from paley.core.errors import PaleyError
from paley.core.grids import AnyGrid
from paley.core.rounding import Outliers, Quantized, check_groups, codes_per_row
from paley.core.schemes import LinearScheme, WeightScheme
from paley.format.checkpoint import Checkpoint
from paley.format.config import FORMAT_VERSION, QUANT_METHOD, QuantizationConfig

__all__ = [
    "BIAS", "FORMAT_VERSION", "OUTLIER_COLUMNS", "PARTS", "QUANT_METHOD", "WEIGHT", "QuantizationConfig",
    "check_outliers", "check_values", "decode_linear", "encode_linear", "expected_tensors", "linear_bytes",
    "quantization_of", "unpack_weight",
]  # fmt: skip

CODES, SCALES, ZEROS = ".codes", ".scales", ".zeros"  # suffixes of a quantized linear's name
OUTLIERS, OUTLIER_SCALES, OUTLIER_COLUMNS = ".outliers", ".outlier_scales", ".outlier_columns"
DIAGONAL = ".diagonal"
PARTS = (CODES, SCALES, ZEROS, OUTLIERS, OUTLIER_SCALES, OUTLIER_COLUMNS)
WEIGHT, BIAS = ".weight", ".bias"
SCALE_DTYPE = torch.float16

Expected = dict[str, tuple[torch.dtype | None, tuple[int, ...]]]


class Tensors(Protocol):
    """A source of tensors: a dict, or a Checkpoint."""

    def __contains__(self, name: object, /) -> bool: ...
    def __getitem__(self, name: str, /) -> Tensor: ...


def quantization_of(checkpoint: Checkpoint) -> QuantizationConfig:
    """The checked section "quantization_config" of config.json; PaleyError if the folder is no Paley checkpoint."""
    folder, section = checkpoint.folder, checkpoint.config.get("quantization_config")
    if not isinstance(section, dict) or section.get("quant_method") != QUANT_METHOD:
        raise PaleyError(
            f"{folder}: is no Paley checkpoint: nothing here is quantized, or by another tool; "
            "give a folder that `paley quantize` wrote"
        )
    return QuantizationConfig.from_dict(section, f"{folder}/config.json: quantization_config")


def expected_tensors(name: str, scheme: LinearScheme, in_features: int, out_features: int) -> Expected:
    """Name -> (dtype, shape) of the tensors that store the weight [out_features, in_features]; dtype None: any floats.

    in_features is the stored width: scheme.transform.out_dim if there is a transform. A bias is not listed.
    """
    if scheme.transform is not None and scheme.transform.out_dim != in_features:
        raise PaleyError(
            f"{name}: in_features={in_features}, but its transform ends at out_dim={scheme.transform.out_dim}"
        )
    beside: Expected = {}
    if scheme.diagonal and scheme.transform is not None:
        beside = {name + DIAGONAL: (SCALE_DTYPE, (scheme.transform.in_dim,))}
    if scheme.weight is None:
        return {name + WEIGHT: (None, (out_features, in_features)), **beside}
    if in_features < 1:
        raise PaleyError(f"{name}: in_features={in_features} must be positive")
    size = scheme.weight.group_size or in_features
    check_groups(in_features, size, name, what="in_features=")
    check_outliers(name, scheme.outliers, in_features)
    grid = scheme.weight.grid
    width = packing.packed_bytes(codes_per_row(in_features, grid.p), grid.size)
    groups = (out_features, in_features // size)
    expected: Expected = {
        name + CODES: (torch.uint8, (out_features, width)),
        name + SCALES: (SCALE_DTYPE, (*groups, *grid.scale_shape)),
    }
    if grid.affine:
        expected[name + ZEROS] = (torch.uint8, groups)
    if scheme.outliers:
        expected[name + OUTLIERS] = (torch.uint8, (out_features, scheme.outliers))
        expected[name + OUTLIER_SCALES] = (SCALE_DTYPE, (out_features, 1))
        expected[name + OUTLIER_COLUMNS] = (torch.int32, (scheme.outliers,))
    return expected | beside


def check_outliers(name: str, outliers: int, in_features: int) -> None:
    """Raises if outliers leave no column for the weight's own grid."""
    if outliers >= in_features:
        raise PaleyError(f"{name}: outliers={outliers} must be fewer than its in_features={in_features} columns")


def linear_bytes(name: str, scheme: LinearScheme, in_features: int, out_features: int, itemsize: int) -> int:
    """Bytes that store the weight of a linear, without its bias; itemsize: of a value that stays unquantized."""
    tensors = expected_tensors(name, scheme, scheme.stored_width(in_features), out_features).values()
    return sum((dtype.itemsize if dtype else itemsize) * math.prod(shape) for dtype, shape in tensors)


def encode_linear(name: str, q: Quantized) -> dict[str, Tensor]:
    """codes [out, in / p], scales and zeros [out, groups] -> the tensors NAME.codes, NAME.scales, ... as stored.

    Errors: PaleyError for values that cannot be stored: scales that are not float16, zeros outside of the grid.
    """
    grid = q.grid
    shapes = tuple(q.codes.shape), tuple(q.scales.shape)
    if [len(shape) for shape in shapes] != [2, 2 + len(grid.scale_shape)] or not shapes[1][1] or q.width % shapes[1][1]:
        wanted = "[out, groups, stored]" if grid.scale_shape else "[out, groups]"
        raise PaleyError(f"{name}: codes must be [out, in / p] and scales {wanted}, got {shapes}")
    scales = q.scales.to(SCALE_DTYPE)
    if not torch.equal(scales.to(q.scales.dtype), q.scales):  # also true if there is a NaN
        raise PaleyError(f"{name}: scales are not float16 values; round them with rounding.storable first")
    tensors = {name + CODES: packing.pack_codes(q.codes, grid.size), name + SCALES: scales}
    if q.zeros is not None:
        tensors[name + ZEROS] = q.zeros
    if q.outliers is not None:
        tensors[name + OUTLIERS] = q.outliers.codes
        tensors[name + OUTLIER_SCALES] = q.outliers.scales
        tensors[name + OUTLIER_COLUMNS] = q.outliers.columns
    out_features, in_features = shapes[0][0], q.width
    outliers = 0 if q.outliers is None else len(q.outliers.columns)
    scheme = LinearScheme(WeightScheme("int4", q.group_size).on_grid(grid), outliers=outliers)
    _check_form(name, tensors, expected_tensors(name, scheme, in_features, out_features))
    check_values(name, tensors, in_features, grid)
    return tensors


def decode_linear(name: str, tensors: Tensors, scheme: LinearScheme, in_features: int) -> Quantized:
    """NAME.codes and the rest, as stored -> codes [out, in_features / p], scales and zeros [out, groups].

    PaleyError for a tensor that is missing or too many, of the wrong dtype or shape, or damaged.
    """
    if scheme.weight is None:
        raise PaleyError(f"{name}: its scheme leaves the weight unquantized; read {name + WEIGHT} itself")
    if name + WEIGHT in tensors:
        raise PaleyError(f"{name}: is stored quantized, and as {name + WEIGHT} too; one of them is stale")
    stored = {name + part: tensors[name + part] for part in PARTS if name + part in tensors}
    codes = stored.get(name + CODES)
    out_features = codes.shape[0] if codes is not None and codes.dim() else 0
    expected = expected_tensors(name, replace(scheme, diagonal=False), in_features, out_features)
    _check_form(name, stored, expected)
    grid = scheme.weight.grid
    check_values(name, stored, in_features, grid)
    codes, outliers = unpack_weight(stored[name + CODES], grid, in_features), None
    if scheme.outliers:
        outliers = Outliers(*(stored[name + part] for part in (OUTLIER_COLUMNS, OUTLIERS, OUTLIER_SCALES)))
    return Quantized(codes, stored[name + SCALES], stored.get(name + ZEROS), grid, in_features, outliers)


def unpack_weight(packed: Tensor, grid: AnyGrid, in_features: int) -> Tensor:
    """packed uint8 [out, bytes] -> codes [out, ceil(in_features / p)]."""
    return packing.unpack_codes(packed, grid.size, codes_per_row(in_features, grid.p))


def _check_form(name: str, found: Mapping[str, Tensor], wanted: Expected) -> None:
    """Raises unless `found` has exactly these tensors, with these dtypes and shapes."""
    for tensor, (dtype, shape) in wanted.items():
        if tensor not in found:
            raise PaleyError(f"{tensor}: is missing")
        got = found[tensor]
        if got.dtype != dtype or tuple(got.shape) != shape:
            raise PaleyError(f"{tensor}: must be {dtype} {shape}, got {got.dtype} {tuple(got.shape)}")
    if extra := sorted(found.keys() - wanted.keys()):
        raise PaleyError(f"{extra[0]}: is there, but the grid of {name} has no such tensor")


def check_values(name: str, found: Mapping[str, Tensor], in_features: int, grid: AnyGrid) -> None:
    """Raises unless scales are positive and finite, points ascend, zeros and columns exist, and padding is 0."""
    codes, scales, zeros = found[name + CODES], found[name + SCALES], found.get(name + ZEROS)
    grid.check_scales(scales, name + SCALES)
    if (columns := found.get(name + OUTLIER_COLUMNS)) is not None:
        _check_outlier_columns(name, columns, in_features)
        outlier_scales = found[name + OUTLIER_SCALES]
        if not bool(((outlier_scales > 0) & outlier_scales.isfinite()).all()):
            raise PaleyError(f"{name + OUTLIER_SCALES}: must be positive and finite, and are not; the file is damaged")
    if zeros is not None and zeros.numel() and int(zeros.max()) >= grid.size:
        raise PaleyError(f"{name + ZEROS}: holds {int(zeros.max())}, beyond the last code of {grid.name}")
    k, bits = packing.symbol(grid.size)
    used = -(-codes_per_row(in_features, grid.p) // k) * bits % 8
    if used and codes.numel() and int(codes[:, -1].max()) >> used:
        raise PaleyError(f"{name + CODES}: the bits after a row's last code must be 0; the file is damaged")


def _check_outlier_columns(name: str, columns: Tensor, in_features: int) -> None:
    """Raises unless the columns ascend and exist in the weight."""
    within = bool((columns >= 0).all()) and bool((columns < in_features).all())
    if not within or bool((columns.long().diff() <= 0).any()):
        raise PaleyError(f"{name + OUTLIER_COLUMNS}: must ascend within {in_features} columns; the file is damaged")
