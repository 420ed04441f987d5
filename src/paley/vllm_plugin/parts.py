"""What one layer of vLLM multiplies by: one linear of a folder, or several that vLLM fuses (q, k and v; gate and up).

A folder stores a tensor set for each linear, and schemes may differ within a fused layer. So each part keeps its own
codes and is one product; their outputs follow one another. vLLM gets one flat parameter for each kind of tensor, in
which the parts lie one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from paley.core.errors import PaleyError
from paley.core.schemes import LinearScheme
from paley.format.spec import DIAGONAL, PARTS, check_values, expected_tensors
from paley.model.linear import QuantLinear
from paley.model.reading import share_input_
from paley.ops.embedding import embed
from paley.ops.matmul import Packed

__all__ = ["Parts"]

_SHARDS = {None: 0, "q": 0, "k": 1, "v": 2}  # vLLM counts the parts of gate_up_proj, and names those of qkv_proj
_LAYERS: WeakValueDictionary[str, Parts] = WeakValueDictionary()  # a compiled graph knows a layer by its key alone


@dataclass(frozen=True)
class _Piece:
    """The tensor of one part within a flat parameter."""

    name: str
    part: int
    shape: tuple[int, ...]
    start: int

    def view(self, flat: Tensor) -> Tensor:
        return flat[self.start : self.start + math.prod(self.shape)].view(self.shape)


class Parts:
    """names, rows: of the linears, in the order of their outputs. width: of their input.

    tensors: flat parameters by their ending, `codes`, `scales` and so on, for vLLM to fill. Errors: PaleyError for a
    scheme that does not fit the width.
    """

    def __init__(
        self, names: Sequence[str], schemes: Sequence[LinearScheme], rows: Sequence[int], width: int, dtype: torch.dtype
    ):
        self.dtype, self.width, self.rows = dtype, width, sum(rows)
        self.linears = []
        self._pieces: dict[str, list[_Piece]] = {}
        dtypes: dict[str, torch.dtype] = {}
        ends: dict[str, int] = {}
        for part, (name, scheme, count) in enumerate(zip(names, schemes, rows, strict=True)):
            if scheme.transform is not None and scheme.transform.in_dim != width:
                raise PaleyError(f"{name}: transform.in_dim={scheme.transform.in_dim}, but the layer reads {width}")
            stored = scheme.stored_width(width)
            self.linears.append(
                QuantLinear(stored, count, bias=False, scheme=scheme, dtype=dtype, device="meta", name=name)
            )
            for full, (kind, shape) in expected_tensors(name, scheme, stored, count).items():
                end = full.rpartition(".")[2]
                start = ends.get(end, 0)
                self._pieces.setdefault(end, []).append(_Piece(full, part, shape, start))
                ends[end], dtypes[end] = start + math.prod(shape), kind or dtype
        self.tensors = {
            end: nn.Parameter(torch.zeros(size, dtype=dtypes[end]), requires_grad=False) for end, size in ends.items()
        }
        self._loaded: set[str] = set()
        for end, tensor in self.tensors.items():
            tensor.weight_loader = self._loader(end)  # pyright: ignore[reportAttributeAccessIssue]
        self.key = next(key for key in _keys(names[0]) if key not in _LAYERS)
        _LAYERS[self.key] = self

    def _loader(self, end: str) -> Callable[..., None]:
        def load(param: Tensor, loaded: Tensor, shard: str | int | None = None) -> None:
            part = _SHARDS.get(shard, shard)
            piece = next((piece for piece in self._pieces[end] if piece.part == part), None)
            if piece is None:
                raise PaleyError(f"{self.linears[0].name}: its files hold {end} of part {shard!r}, which has none")
            if tuple(loaded.shape) != piece.shape or (end != "weight" and loaded.dtype != param.dtype):
                raise PaleyError(
                    f"{piece.name}: must be {param.dtype} {piece.shape}", got=f"{loaded.dtype} {tuple(loaded.shape)}"
                )
            piece.view(param.data).copy_(loaded)
            self._loaded.add(piece.name)

        return load

    def finish_(self, product: str, *, multiplied: bool = True, looked_up: bool = False) -> None:
        """Checks what was loaded and makes the products ready.

        multiplied: False for an embedding that is looked up alone. looked_up: whether codes must stay for that.
        Errors: PaleyError for tensors that are missing or damaged.
        """
        for end, pieces in self._pieces.items():
            for piece in pieces:
                if piece.name not in self._loaded:
                    raise PaleyError(f"{piece.name}: is missing from the files; copy the whole folder again")
                view, linear = piece.view(self.tensors[end].data), self.linears[piece.part]
                setattr(linear, end, nn.Parameter(view, requires_grad=False) if end == "weight" else view)
        self.tensors = {}
        for linear in self.linears:
            _check(linear)
        if len(self.linears) > 1:
            share_input_(self.linears)
        for linear in self.linears if multiplied else ():
            linear.prepare_(product, self.dtype)
            if not looked_up and not isinstance(linear.product, Packed):
                for part in ("codes", "scales", "zeros", "outliers", "outlier_scales"):  # the product has its own
                    setattr(linear, part, None)

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., width] -> [..., rows], in x's dtype."""
        if torch.compiler.is_compiling():
            return torch.ops.paley.vllm_multiply(x, self.key, self.rows)
        outputs = [linear(x) for linear in self.linears]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)

    def look_up(self, ids: Tensor) -> Tensor:
        """ids [...] -> rows [..., width] of an embedding."""
        if torch.compiler.is_compiling():
            return torch.ops.paley.vllm_look_up(ids, self.key, self.width, self.dtype)
        (linear,) = self.linears
        parts = {name: part for name, part in linear.named_buffers() if part is not None}
        return embed(ids, parts, linear.scheme, linear.width, self.dtype)


def _keys(name: str) -> Iterator[str]:
    """name, and further ones for the same layer of a second model."""
    yield name
    number = 1
    while True:
        number += 1
        yield f"{name} {number}"


def _check(linear: QuantLinear) -> None:
    """Raises for numbers that no folder of Paley's has."""
    name, scheme = linear.name, linear.scheme
    if scheme.weight is not None:
        found = {name + part: tensor for part in PARTS if (tensor := getattr(linear, part[1:])) is not None}
        check_values(name, found, linear.width, scheme.weight.grid)
    elif linear.weight is not None and not bool(linear.weight.isfinite().all()):
        raise PaleyError(f"{name}.weight: holds a number that is not finite; the file is damaged")
    if linear.diagonal is not None and not bool(((linear.diagonal > 0) & linear.diagonal.isfinite()).all()):
        raise PaleyError(f"{name}{DIAGONAL}: must be positive and finite; the file is damaged")


# What torch.compile leaves as it is: native kernels, and inputs that parts share, are nothing that can be traced.
@torch.library.custom_op("paley::vllm_multiply", mutates_args=())
def _multiply(x: torch.Tensor, key: str, rows: int) -> torch.Tensor:
    return _LAYERS[key](x)


@_multiply.register_fake
def _(x: torch.Tensor, key: str, rows: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], rows))


@torch.library.custom_op("paley::vllm_look_up", mutates_args=())
def _look_up(ids: torch.Tensor, key: str, width: int, dtype: torch.dtype) -> torch.Tensor:
    return _LAYERS[key].look_up(ids)


@_look_up.register_fake
def _(ids: torch.Tensor, key: str, width: int, dtype: torch.dtype) -> torch.Tensor:
    return ids.new_empty((*ids.shape, width), dtype=dtype)
