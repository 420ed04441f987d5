"""What rounding loses of a model's own keys, values and layer inputs: outliers and biases make them no Gaussians."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from paley.core.schemes import ActivationScheme, LinearScheme, Schemes
from paley.core.transforms import Transform
from paley.model.adapter import Adapter
from paley.model.capture import BlockRunner, capture_inputs
from paley.model.key_statistics import KeySettler
from paley.model.keys import KeyBase
from paley.model.kv_cache import cache_argument
from paley.ops.attention import SCALE_DTYPE
from paley.ops.rounding import round_trip

__all__ = ["MeasuredErrors", "Place", "measure_errors"]

Place = tuple[str, str]  # a module's path, and its scheme's field: keys, values or input


@dataclass(frozen=True)
class MeasuredErrors:
    """t^2 of each scheme at each place: the mean over vectors of |x - round(x)|^2 / |x|^2, as slopes' noise has it."""

    table: Mapping[tuple[Place, ActivationScheme], float]

    def __call__(self, place: Place, scheme: ActivationScheme, width: int) -> float:
        return self.table[place, scheme]


@torch.no_grad()
def measure_errors(
    adapter: Adapter,
    ids: Tensor,
    schemes: Schemes,
    options: Mapping[Place, Sequence[ActivationScheme]],
) -> MeasuredErrors:
    """One forward of ids [sequences, seq_len], unrounded: adapter is rotated and wrapped, but no scheme is active.

    options: the schemes whose errors are measured, of each place.

    Keys are those behind RoPE. Errors are relative to what a slope's noise was relative to: the key with its mean.
    """
    settler = KeySettler(BlockRunner(adapter), ids, schemes.attentions)
    for block in adapter.blocks:
        settler.settle(block, {})
    table: dict[tuple[Place, ActivationScheme], float] = {}
    model = adapter.model

    def add(path: str, x: Tensor) -> None:
        place = path, "input"
        rounded, columns = _turned_input(x, schemes.linears[path])
        table.update({(place, s): _error(x, rounded, s, torch.float32, columns) for s in options[place]})

    cache = DynamicCache()
    watched = {path: model.get_submodule(path) for path, field in options if field == "input"}
    with capture_inputs(watched, add):
        model(ids, use_cache=True, logits_to_keep=1, **cache_argument(model, cache))
    for block in adapter.blocks:
        path = block.attention
        layer = cache.layers[adapter.module(path).layer_idx]
        for field, x in (("keys", layer.keys), ("values", layer.values)):
            place = path, field
            if place not in options:
                continue
            assert x is not None
            scheme, base = schemes.attentions[path], adapter.module(path).key_base
            rounded = _turned(x, scheme.key_transform, base) if field == "keys" else _turned(x, scheme.value_transform)
            table.update({(place, s): _error(x, rounded, s, SCALE_DTYPE) for s in options[place]})
    return MeasuredErrors(table)


def _turned_input(x: Tensor, scheme: LinearScheme) -> tuple[Tensor, Tensor]:
    """x [tokens, in] -> what the scheme rounds, and its columns of most energy: outliers, which have a finer grid."""
    x = x if scheme.transform is None else scheme.transform.apply(x)
    columns = x.double().square().sum(0).topk(scheme.outliers).indices
    return x.index_fill(-1, columns, 0.0), columns


def _turned(x: Tensor, transform: Transform | None, base: KeyBase | None = None) -> Tensor:
    """Keys or values [batch, kv_heads, tokens, head_dim] -> rotated, and less what keys have in common."""
    x = x if transform is None else transform.apply(x)
    return x if base is None else x - base.new(x)


def _error(
    x: Tensor, turned: Tensor, scheme: ActivationScheme, scale_dtype: torch.dtype, apart: Tensor | None = None
) -> float:
    """Each vector counts alike: one of huge values would else be all that is seen. apart: columns that do not count."""
    off = round_trip(turned, scheme, scale_dtype).double() - turned
    lost = (off if apart is None else off.index_fill(-1, apart, 0.0)).square().sum(-1)
    return float((lost / x.double().square().sum(-1).clamp(min=torch.finfo(torch.float64).tiny)).mean())
