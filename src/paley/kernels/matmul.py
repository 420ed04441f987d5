"""The native product of integer inputs with a coded weight. `paley.ops.matmul.grid_matmul` has its meaning.

A grid's points become integers: of 8 bits, or of 13 if rounding points and inputs to 8 bits would show beside the
grid's own. Inputs become integers of as many bits: the codes of the scheme that rounds them if its points are such
integers, else the values with a scale for each segment of columns. Sums of products are exact.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from paley.core.errors import PaleyError, nearest_name
from paley.core.grids import AnyGrid, FreeGrid, Grid
from paley.core.rounding import Quantized
from paley.core.schemes import ActivationScheme, LinearScheme
from paley.core.trellis import TrellisGrid
from paley.kernels import native, rounding
from paley.kernels.integers import LIMITS, coded, integers
from paley.kernels.stored import MatrixSource, StoredWeight

__all__ = [
    "LEVELS", "InputsHow", "Plan", "PreparedMatrix", "best_level", "encode", "fastest", "inputs_how", "levels",
    "matmul", "plan", "prepare", "takes",
]  # fmt: skip

LEVELS = ("portable", "avx2", "avx512", "", "", "avx2_vnni", "amx", "neon")  # paley_level of csrc/paley.h
KINDS = (
    "table2", "table3", "table4", "own2", "pairs4", "pairs6", "pairs8", "look8", "look9", "look10", "look12",
    "bytes", "words", *(f"trellis{rate}" for rate in ("1", "1.5", "2", "2.5", "3", "3.5", "4", "5", "6")), "table6",
)  # fmt: skip
_SEGMENT = 64  # columns of inputs that share a scale, if the scheme does not say
_TURNED = 256  # likewise, at most, of inputs that a Hadamard transform makes nearly Gaussian: none sticks out
_LONGEST_FINE = 128
_INPUT_ERROR = 0.0069  # of Gaussian values in segments of 256, rounded to 8 bits; relative. Of 64: 0.0060
_SEEN = 0.12  # what rounding to 8 bits may add to a grid's relative error, as a share of it
_LEAST_SEGMENT = 16
_MOST_BITS = 17.0
_SHARE = 2**22  # least number of products for a thread
_PACKED = 2**18  # likewise of weights that are prepared, some 0.5 ms
_TRELLIS_COLUMNS = 32  # whose codes lie together


class InputsHow(ctypes.Structure):
    """paley_inputs_how of csrc/paley.h."""

    _fields_ = [
        ("rounding", ctypes.c_void_p), ("diagonal", ctypes.c_void_p), ("map", ctypes.c_void_p),
        ("map_scale", ctypes.c_float), ("outlier_columns", ctypes.c_void_p),
    ]  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """How a weight of some scheme and width is stored, and its inputs. map: of the input's codes, or none."""

    kind: str
    fine: bool
    group: int
    segment: int
    p: int
    map: tuple[int, ...] | None = None
    map_scale: float = 1.0

    def bits(self, width: int) -> float:
        """Bits of memory for each weight of 4096 rows so wide, whose table is small beside them."""
        kind = KINDS.index(self.kind)
        source = MatrixSource(4096, width, self.group, self.segment, kind, self.fine, self.p, points=1)
        size = ctypes.c_int64()
        native.call(native.load().paley_matrix_bytes, ctypes.byref(source), ctypes.byref(size))
        return 8 * size.value / (4096 * width)

    @property
    def shared(self) -> Hashable:
        """Weights whose plans agree in it, and whose inputs are turned and rounded alike, read the same inputs."""
        return self.fine, self.group, self.segment, self.p if self.kind.startswith("look") else 0, self.map


@dataclass(frozen=True, eq=False)
class PreparedMatrix:
    """blob uint8 [bytes]: the weight [out, width] as kernels read it."""

    plan: Plan
    blob: Tensor = field(repr=False)
    out: int
    width: int
    outlier_columns: Tensor | None = None


def levels() -> list[str]:
    """The LEVELS that this machine has."""
    bits = native.load().paley_matmul_levels()
    return [name for i, name in enumerate(LEVELS) if bits >> i & 1]


def best_level() -> str:
    """The fastest level of this machine, or the one that $PALEY_ISA names.

    Errors: PaleyError if the machine or the library does not have the level of that name.
    """
    best, wanted = LEVELS[native.load().paley_best_matmul_level()], os.environ.get("PALEY_ISA")
    if wanted and wanted != best:
        remedy = f"unset it, or choose of {', '.join(levels())}"
        raise PaleyError("$PALEY_ISA: this machine does not have that level", got=wanted, remedy=remedy)
    return best


def fastest(made: Plan) -> Plan:
    """The same products by the kind that one token is multiplied fastest with here, though it may be larger.

    Without permutations of bytes across a register (AVX-512 VBMI), codes of 8 bits and more are looked up one by one.
    """
    slow = made.kind.startswith(("look", "trellis")) or made.kind in ("pairs8", "table6")
    if not slow or best_level() in ("avx512", "amx"):
        return made
    return replace(made, kind="words" if made.fine else "bytes", p=1)


@functools.lru_cache(maxsize=256)
def plan(scheme: LinearScheme, width: int, beside: float = 0.0) -> Plan | None:
    """How a weight of this scheme, `width` columns wide as stored, is multiplied; None if these kernels do not.

    beside: relative error (rms) of the model's other weights. What 8 bits add is not seen next to that, either.
    """
    if scheme.weight is None or width > 2**16:
        return None
    grid, group = scheme.weight.grid, scheme.weight.group_size or width
    fine = _is_fine(grid, scheme.input, beside)
    inputs = _map(scheme.input, fine)
    if inputs is None and not fine and _is_fine(grid, None, beside):  # values that 8 bits do not hold
        fine, inputs = True, _map(scheme.input, True)
    kind = _kind(grid, fine, group)
    p = grid.p if kind not in ("bytes", "words") else 1
    segment = _segment(scheme, group, fine, p)
    if inputs is not None and scheme.input is not None:
        common = math.gcd(group, scheme.input.group_size or width)
        most = _LONGEST_FINE if fine else common
        segment = max(d for d in range(1, min(most, common) + 1) if common % d == 0)
        if segment < min(_LEAST_SEGMENT, common) or segment % p:
            inputs, segment = None, _segment(scheme, group, fine, p)
    segment = min(segment, group)
    if kind.startswith("trellis") and (group % _TRELLIS_COLUMNS or segment % _TRELLIS_COLUMNS):
        kind, p = "bytes", 1
    return Plan(kind, fine, group, segment, p, *(inputs or (None, 1.0)))


def _segment(scheme: LinearScheme, group: int, fine: bool, p: int) -> int:
    """Columns of inputs that share a scale: alike in a group, and a multiple of what the kernels read at a time."""
    transform, together = scheme.transform, _SEGMENT // p * p
    most = _SEGMENT if fine or transform is None else min(_TURNED, max(_SEGMENT, transform.order))
    share = -(-group // -(-group // most))
    return -(-share // together) * together


def _is_fine(grid: AnyGrid, inputs: ActivationScheme | None, beside: float) -> bool:
    if isinstance(grid, FreeGrid):
        return False
    if grid.affine and grid.size > 16:
        return True
    own = math.sqrt(grid.mse)
    error = 1 / 127
    if isinstance(grid, Grid):
        whole, _, error = integers(grid, LIMITS[0])
        if int(whole.min()) < -LIMITS[0]:
            return True
    elif isinstance(grid, TrellisGrid):
        error = 0.0  # its values are integers of 8 bits
    return math.hypot(error, 0.0 if inputs is not None else _INPUT_ERROR) > _SEEN * max(own, beside)


def _kind(grid: AnyGrid, fine: bool, group: int) -> str:
    """The smallest kind that holds the grid's codes."""
    if isinstance(grid, FreeGrid):
        return "own2" if grid.bits <= 2 else "bytes"
    if isinstance(grid, TrellisGrid):
        return grid.name if not fine or grid.bits >= 5 else "bytes"
    if not isinstance(grid, Grid) or group % grid.p:
        return "words" if fine else "bytes"
    look = next((bits for bits in (8, 9, 10, 12) if grid.size <= 2**bits), None)
    if fine:
        if grid.p == 2 and look:
            return f"look{look}"
        whole, scale, _ = integers(grid, LIMITS[1])
        return "bytes" if scale == 1.0 and int(whole.min()) >= -128 and int(whole.max()) <= 127 else "words"
    if grid.p <= 2:
        tables, pairs = (2, 3, 4, 6), (4, 6, 8)
        sizes = [(b, f"table{b}") for b in tables] if grid.p == 1 else [(b, f"pairs{b}") for b in pairs]
        return next((kind for bits, kind in sizes if grid.size <= 2**bits), "bytes")
    return f"look{look}" if grid.p <= 4 and look else "bytes"


def _map(scheme: ActivationScheme | None, fine: bool) -> tuple[tuple[int, ...], float] | None:
    """The integer of each code of a rounded input, and their scale; None if 8 or 13 bits do not hold them."""
    if scheme is None or scheme.refit or not isinstance(scheme.grid, Grid) or scheme.grid.p > 1:
        return None
    grid = scheme.grid
    if grid.size > 2**8 or (grid.affine and not fine and grid.size > 2**7):
        return None
    points, scale, error = integers(grid, LIMITS[fine])
    if error > 0.1 * math.sqrt(grid.mse):
        return None
    table = points[:, 0].tolist()
    return (*table, *[table[-1]] * (256 - len(table))), scale


def takes(scheme: LinearScheme, width: int) -> bool:
    """Whether these kernels multiply such weights, and hold them in no more than 16 bits each."""
    made = plan(scheme, width)
    return made is not None and made.bits(width) <= _MOST_BITS


def prepare(
    q: Quantized | StoredWeight, scheme: LinearScheme, made: Plan | None = None, *,
    later: list[Callable[[], None]] | None = None,
) -> PreparedMatrix:  # fmt: skip
    """A weight q of `scheme` -> what `matmul` reads, as `made` or `plan` says; PaleyError if there is no plan.

    later: gets the call that fills the blob, which then is empty; it may run on any thread, and raises for bad codes.
    """
    made = made or plan(scheme, q.width)
    if made is None:
        raise PaleyError(f"matmul: native kernels take no weights such as {scheme}; take another product")
    trellis = made.kind.startswith("trellis")
    if isinstance(q, StoredWeight) and not (isinstance(q.grid, Grid) or made.kind == "own2" or trellis):
        q = q.unpacked()  # values do not follow from single codes
    rows, stored = q.codes.shape[0], isinstance(q, StoredWeight)
    table, codes, table_scale, scales, own = coded(q, made.kind, fine=made.fine)
    zeros = None if q.zeros is None else q.zeros.contiguous()
    kept = [table, codes.contiguous() if stored else codes.int().contiguous(), scales.half().contiguous(), zeros, own]
    outliers, values = q.outliers, (None, None, None)
    if outliers is not None:
        ints = outliers.codes.short() - 128
        values = (outliers.columns.int(), ints.clamp(min=-127).to(torch.int8), outliers.scales.half().flatten())
        values = tuple(value.contiguous() for value in values)
    pointers = [None if x is None else x.data_ptr() for x in (*kept, *values)]
    source = MatrixSource(
        rows, q.width, made.group, made.segment, KINDS.index(made.kind), made.fine, made.p, zeros is not None,
        4 if own is not None else q.grid.size if trellis else len(table), table_scale, *pointers[:5],
        0 if outliers is None else len(outliers.columns), *pointers[5:],
    )  # fmt: skip
    packed = None
    if isinstance(q, StoredWeight):
        source.codes, packed = None, ctypes.byref(q.packed(kept[1]))
        source.p = q.grid.p  # also of a kind that has values in place of codes
    library, size = native.load(), ctypes.c_int64()
    native.call(library.paley_matrix_bytes, ctypes.byref(source), ctypes.byref(size))
    blob = aligned(size.value)
    threads = 1 if later is not None else max(1, min(torch.get_num_threads(), rows * q.width // _PACKED))

    def fill(_kept: object = (kept, values)) -> None:  # what the source points to lives as long
        status = library.paley_pack_stored_matrix(ctypes.byref(source), packed, threads, size.value, blob.data_ptr())
        if status and isinstance(q, StoredWeight):
            q.unpacked()  # raises for codes that cannot be
        native.check(library.paley_pack_stored_matrix, status)

    if later is None:
        fill()
    else:
        later.append(fill)
    return PreparedMatrix(made, blob, rows, q.width, values[0])


def aligned(size: int) -> Tensor:
    """uint8 [size], at a multiple of 64 bytes."""
    room = torch.empty(size + 64, dtype=torch.uint8)
    start = -room.data_ptr() % 64
    return room[start : start + size]


def inputs_how(
    made: Plan, scheme: LinearScheme | None, width: int, diagonal: Tensor | None, outlier_columns: Tensor | None
) -> tuple[InputsHow, list[object]]:
    """How values [width] become the inputs of a weight, and what that points to; scheme None: they are rounded."""
    how = InputsHow(map_scale=made.map_scale)
    kept: list[object] = [diagonal, outlier_columns]
    if scheme is not None and (scheme.transform is not None or scheme.input is not None or diagonal is not None):
        raw = rounding.rounding_of(width, scheme.input, scheme.transform, torch.float32)
        how.rounding = ctypes.addressof(raw.raw)
        stored = scheme.stored_width(width)
        if raw.raw.out_dim != stored:
            raise PaleyError(f"matmul: inputs become {raw.raw.out_dim} values, and the weight has {stored} columns")
        if diagonal is not None:
            diagonal = diagonal.detach().float().contiguous()
            how.diagonal = diagonal.data_ptr()
        kept += [raw, diagonal]
        if made.map is not None and scheme.input is not None:
            table = torch.tensor(made.map, dtype=torch.int16)
            how.map = table.data_ptr()
            kept.append(table)
    if outlier_columns is not None:
        how.outlier_columns = outlier_columns.data_ptr()
    return how, kept


def encode(
    x: Tensor, matrix: PreparedMatrix, scheme: LinearScheme | None = None, diagonal: Tensor | None = None, *,
    threads: int | None = None,
) -> Tensor:  # fmt: skip
    """x float32 [tokens, in] -> the inputs of `matmul`, uint8 [bytes]; scheme None: x is turned and rounded already."""
    made, library = matrix.plan, native.load()
    turned = scheme is not None and (scheme.transform is not None or scheme.input is not None or diagonal is not None)
    width = x.shape[-1] if turned else matrix.width
    if x.dtype != torch.float32 or x.device.type != "cpu" or x.dim() != 2 or x.shape[1] != width:
        raise PaleyError(
            f"matmul: native kernels read float32 [tokens, {width}] on the CPU, got {x.dtype} {list(x.shape)} on "
            f"{x.device}; convert it"
        )
    x = x.detach().contiguous()
    how, kept = inputs_how(made, scheme if turned else None, width, diagonal, matrix.outlier_columns)
    blob, size = matrix.blob, ctypes.c_int64()
    native.call(library.paley_inputs_bytes, blob.data_ptr(), len(blob), len(x), ctypes.byref(size))
    inputs = aligned(size.value)
    if threads is None:
        threads = max(1, min(torch.get_num_threads(), x.numel() // 2**16))
    native.call(
        library.paley_encode_inputs,
        ctypes.byref(how), x.data_ptr(), len(x), blob.data_ptr(), len(blob), threads, len(inputs), inputs.data_ptr(),
    )  # fmt: skip
    del kept
    return inputs


def matmul(
    inputs: Tensor, tokens: int, matrix: PreparedMatrix, *, level: str | None = None, threads: int | None = None
) -> Tensor:
    """inputs of `encode`, for this matrix or one of the same layout -> float32 [tokens, out].

    The same bits on every level and with any number of threads.
    """
    library = native.load()
    if level is not None and level not in LEVELS:
        raise PaleyError(f"matmul: level {level!r} is none of {', '.join(levels())}{nearest_name(level, LEVELS)}")
    if level is None:
        number = library.paley_best_matmul_level()
    elif level in levels():
        number = LEVELS.index(level)
    else:
        raise PaleyError(f"matmul: this machine lacks instructions of level {level!r}; it has {', '.join(levels())}")
    if threads is None:
        threads = max(1, min(torch.get_num_threads(), tokens * matrix.out * matrix.width // _SHARE))
    y = torch.empty(tokens, matrix.out)
    native.call(
        library.paley_matmul,
        inputs.data_ptr(), len(inputs), tokens, matrix.blob.data_ptr(), len(matrix.blob), number, threads,
        y.data_ptr(),
    )  # fmt: skip
    return y
