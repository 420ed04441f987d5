"""Tunes the floats beside a model's codes, end to end, on the KL to the original: scales, norms' gains, biases.

No code moves and no value is added: each goes back into the type that it is stored in. Gradients pass a rounding as if
it were none (`paley.ops.rounding`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from paley.arch import Sites
from paley.core.grids import AnyGrid
from paley.core.rounding import storable
from paley.core.schemes import LinearScheme
from paley.methods.tuning import Adam, kl_backward
from paley.model.adapter import Adapter
from paley.model.linear import QuantLinear
from paley.ops.inputs import round_input
from paley.ops.matmul import input_key

__all__ = ["ACTIVATIONS", "Scaled", "Tuner", "activation_bytes"]

ACTIVATIONS = 2**31  # bytes of them that may be held for the way back; beyond, blocks run twice
_HELD = 3  # float32 values held for each that a linear reads or writes

_SMALL = 1e-2  # of a root mean square
_FEW = 16  # tokens whose logits tell the size of what the head's bias is added to


def activation_bytes(sites: Sites, seq_len: int) -> int:
    """About what one sequence leaves in all blocks for the way back."""
    return 4 * _HELD * seq_len * sum(sum(site.shape) for site in sites.of("linear"))


class Scaled:
    """A product (`paley.ops.matmul`) whose scales, float32 [rows, groups, *scale_shape], want gradients."""

    name = "scaled"

    def __init__(self, layer: QuantLinear, dtype: torch.dtype):
        """dtype: in which weights and inputs are multiplied."""
        q = layer.quantized()
        assert q is not None
        self._layer, self._dtype, self._q = layer, dtype, q
        self.grid: AnyGrid = q.grid
        self.scales = q.scales.float().requires_grad_()
        self._outliers = None if q.outliers is None else q.outliers.dequantize()
        transform = layer.scheme.transform
        self._turned = self._points_turn()
        self._points: Tensor | None = None
        if not q.grid.free:
            points = q.grid.dequantize(q.codes, torch.ones_like(self.scales), q.zeros, q.width)
            if self._turned and transform is not None:
                points = transform.adjoint(points)
            self._points = points.to(dtype)

    def _points_turn(self) -> bool:
        """Whether the transform goes into the points: if inputs are not rounded, and it leaves groups apart."""
        scheme = self._layer.scheme
        transform, grid = scheme.transform, self.grid
        if transform is None or scheme.input is not None or grid.free or self._outliers is not None:
            return False
        size = self._layer.in_features // self.scales.shape[1]
        return self.scales.shape[1] == 1 or (size % transform.order == 0 and transform.in_dim == transform.out_dim)

    @property
    def how(self) -> Hashable:
        """As of `Dense`."""
        scheme = self._layer.scheme
        return ("scaled", scheme.input, None if self._turned else scheme.transform, *input_key(self._layer))

    def encode(self, x: Tensor) -> Tensor:
        layer = self._layer
        if self._turned:
            return x if layer.diagonal is None else x / layer.diagonal.to(x.dtype)
        return round_input(x, layer.scheme, layer.outlier_columns, layer.diagonal)

    def run(self, encoded: Tensor, x: Tensor) -> Tensor:
        x = encoded.to(self._dtype)
        if self._points is not None and self.scales.shape[1] == 1 and self._outliers is None:
            return linear(x, self._points).float() * self.scales[:, 0]
        return linear(x, self._weight().to(self._dtype)).float()

    def _weight(self) -> Tensor:
        q = self._q
        if self._points is None:
            weight = q.grid.dequantize(q.codes, self.scales, q.zeros, q.width)
        else:
            groups = self._points.unflatten(1, (self.scales.shape[1], -1))
            weight = (groups * self.scales[..., None]).flatten(1)
        if self._outliers is None or q.outliers is None:
            return weight
        return weight.index_copy(1, q.outliers.columns.long(), self._outliers.to(weight.dtype))

    @staticmethod
    def takes(scheme: LinearScheme, width: int, device: torch.device) -> bool:
        """Whether a weight has scales; no layer chooses it by itself."""
        return scheme.weight is not None

    def fits(self, scheme: LinearScheme) -> bool:
        """Schemes stay as they are while scales are tuned."""
        return scheme == self._layer.scheme

    def store_(self) -> None:
        """Puts the scales into the layer, as they are stored; a group whose points would not ascend keeps its own."""
        buffer = self._layer.scales
        assert buffer is not None
        with torch.no_grad():
            if not self.grid.free:
                buffer.copy_(storable(self.scales, buffer.dtype))
                return
            most = torch.finfo(buffer.dtype).max
            found = self.scales.clamp(-most, most).to(buffer.dtype)
            ascends = (self.grid.group_points(found.float()).diff(dim=-1) >= 0).all(-1, keepdim=True)
            buffer.copy_(torch.where(ascends, found, buffer))


class Tuner:
    """A quantized model in memory whose floats follow the original's predictions; to be used in a `with`.

    Gains and biases of the model move with each step, its scales at the end of the `with`. If anything is raised there
    or before, all of them are as they were.
    """

    def __init__(
        self, adapter: Adapter, *, dtype: torch.dtype, keep: Callable[[str, Tensor], Tensor], whole: bool
    ):  # fmt: skip
        """dtype: in which weights and inputs are multiplied. keep(name, value): the value as it is stored.

        whole: activations of all blocks are held for the way back; else each block runs twice.
        """
        self._adapter, self._dtype, self._keep, self._whole = adapter, dtype, keep, whole
        self._undo = ExitStack()
        self._adam: Adam | None = None

    def __enter__(self) -> Tuner:
        with ExitStack() as undo:
            self._scaled = dict(self._scale_(undo))
            self._floats = dict(self._free_(undo))
            if not self._whole:
                for block in self._adapter.blocks:
                    undo.enter_context(_again(block.module))
            self._undo = undo.pop_all()
        self._before = {name: value.detach().clone() for name, value in self._floats.items()}
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        left = self._before
        try:
            if kind is None:
                kept = {name: self._keep(name, value.data) for name, value in self._floats.items()}
                for scaled in self._scaled.values():
                    scaled.store_()
                left = kept
        finally:
            for name, value in self._floats.items():
                value.data = left[name]
            self._undo.close()

    @property
    def tuned(self) -> frozenset[str]:
        """Names of the weights whose scales are tuned."""
        return frozenset(self._scaled)

    def step(self, ids: Tensor, original: Tensor, wanted: Callable[[Tensor], Tensor], rate: float) -> float:
        """One step on ids [seq_len] -> the mean KL before it.

        original [seq_len, n]: what the original's head reads; wanted: what it makes of that.
        """
        self._adam = self._adam or self._begin(ids)
        adapter = self._adapter
        with torch.enable_grad():
            hidden = adapter.head_input(ids[None], use_cache=False)[0, :-1]
            loss = kl_backward(hidden, original[:-1], self._logits, wanted, adapter.sites.head.shape[0])
        self._adam.step(rate)
        return loss

    @torch.no_grad()
    def _begin(self, ids: Tensor) -> Adam:
        """-> steps in units of each value: what biases are added to is measured on ids [seq_len]."""
        adapter, sizes = self._adapter, dict[str, float]()
        gains = set(_gains(adapter))
        with ExitStack() as hooks:
            for name in self._floats.keys() - gains:
                module = adapter.model.get_submodule(name.rpartition(".")[0])
                note = partial(_note_size, sizes, name, len(self._floats[name]))
                hooks.callback(module.register_forward_hook(note).remove)
            self._logits(adapter.head_input(ids[None], use_cache=False)[0, -_FEW:])
        offset = adapter.architecture.gain_offset
        units = {
            name: _unit(value + offset if name in gains else value, sizes.get(name, 0.0))
            for name, value in self._floats.items()
        }
        scales = [scaled.scales for scaled in self._scaled.values()]
        return Adam([*scales, *self._floats.values()], [*map(_unit, scales), *units.values()])

    def _logits(self, hidden: Tensor) -> Tensor:
        return self._adapter.finish(self._adapter.head(hidden))

    def _scale_(self, undo: ExitStack) -> Iterator[tuple[str, Scaled]]:
        """Puts products with scales to tune into the coded linears; those of a tied pair are the embedding's, too."""
        sites = self._adapter.sites
        for site in sites.of("linear", "head"):
            layer = self._adapter.module(site.module)
            if site.stored_as != site.name or not isinstance(layer, QuantLinear) or layer.scheme.weight is None:
                continue
            undo.callback(setattr, layer, "product", layer.product)
            layer.product = scaled = Scaled(layer, self._dtype)
            yield site.name, scaled

    def _free_(self, undo: ExitStack) -> Iterator[tuple[str, nn.Parameter]]:
        """Lets gains and biases want gradients: parameters of one dimension."""
        for name, value in self._adapter.model.named_parameters():
            wanted = value.ndim == 1 and value.is_floating_point()
            undo.callback(value.requires_grad_, value.requires_grad)
            value.requires_grad_(wanted)
            if wanted:
                yield name, value


def _gains(adapter: Adapter) -> Iterator[str]:
    """Names of the gains of all norms that the model's row has."""
    row = adapter.architecture
    if row.walked:
        return
    yield f"{row.norm}.weight"
    for block in adapter.blocks:
        for norm in row.at(adapter.model.config, block.index).norms():
            yield f"{block.name}.{norm.path}.weight"


def _note_size(sizes: dict[str, float], name: str, width: int, _: nn.Module, __: Any, out: object) -> None:
    """A hook: notes the root mean square of what a module computes, if that is [..., width]."""
    if isinstance(out, Tensor) and out.shape[-1] == width:
        sizes[name] = float(out.float().square().mean().sqrt())


def _unit(value: Tensor, beside: float = 0.0) -> Tensor:
    """What a change of a value is relative to: its own size, but at least a share of that of its tensor, or of another.

    beside: the root mean square of what a bias is added to. It moves biases of 0, too.
    """
    size = value.detach().abs()
    return size.clamp(min=_SMALL * max(float(size.square().mean().sqrt()), beside))


@contextmanager
def _again(block: Any) -> Iterator[None]:
    """While open, a block holds nothing for the way back, and runs once more then."""
    block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        del block.forward
