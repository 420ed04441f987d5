"""Rewrites a model's weights in an equal one's coordinates: norms folded, residual stream rotated and widened.

Every step leaves the logits as they were (QuaRot, arXiv:2404.00456; expansion: arXiv:2504.13989, section 4).
All products are taken in float64 and cast once, for folding in 16 bits drifts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from paley.arch import Norm, Site
from paley.core.schemes import Rotation
from paley.core.transforms import Transform
from paley.model.adapter import Adapter, Block
from paley.model.embedding import QuantEmbedding, rescale_

__all__ = ["StreamBack", "fold_norms_", "fold_part_", "parts", "rotate_input_", "scale_keys_"]

_VALUES = 2**24  # of a weight that are in float64 at a time
Part = int | None  # the number of a block; None: what is outside of the blocks


def _set(linear: Any, name: str, value: Tensor) -> None:
    old = getattr(linear, name)
    setattr(linear, name, nn.Parameter(value.to(old.dtype), requires_grad=False))


def _map_inputs_(linear: Any, f: Callable[[Tensor], Tensor]) -> None:
    """weight [out, in] <- f along its rows, some at a time, for float64 takes four times the memory of 16 bits."""
    weight = linear.weight
    few = max(1, _VALUES * len(weight) // max(1, weight.numel()))
    _set(linear, "weight", torch.cat([f(rows.double()).to(weight.dtype) for rows in weight.split(few)]))
    if isinstance(linear, nn.Embedding):
        linear.embedding_dim = linear.weight.shape[1]
    elif hasattr(linear, "hidden_dim"):  # a router
        linear.hidden_dim = linear.weight.shape[1]
    else:
        linear.in_features = linear.weight.shape[1]


def _map_outputs_(linear: Any, f: Callable[[Tensor], Tensor], rows: slice = slice(None)) -> None:
    """weight [out, in] <- f along its columns, and along the bias; of some rows alone if f keeps their number.

    Of a stack, those of each expert.
    """
    count = getattr(linear, "experts", 1)
    of_each = lambda x: _mapped(x.unflatten(-1, (count, -1)), f, rows).flatten(-2)  # noqa: E731
    _set(linear, "weight", of_each(linear.weight.double().T).T.contiguous())
    if linear.bias is not None:
        _set(linear, "bias", of_each(linear.bias.double()))
    linear.out_features = linear.weight.shape[0]


def _mapped(x: Tensor, f: Callable[[Tensor], Tensor], part: slice) -> Tensor:
    """x [..., n] -> f of a part of its last dimension, the rest as it is."""
    if part == slice(None):
        return f(x)
    x = x.clone()
    x[..., part] = f(x[..., part])
    return x


def parts(adapter: Adapter) -> Iterator[Part]:
    """In the order in which they are folded: what is outside first."""
    yield None
    yield from range(len(adapter.blocks))


def fold_part_(adapter: Adapter, rotation: Rotation | None, part: Part) -> None:
    """Folds the norms of one part, and applies R1 and R2 to it, if the rotation has them; else it stays as it is."""
    if rotation is None or rotation.stream is None:
        return
    _fold_norms_(adapter, part)
    _rotate_stream_(adapter, rotation.stream, part)
    if part is not None and rotation.heads is not None and adapter.architecture.values_rotate(adapter.model.config):
        _rotate_values_(adapter, rotation.heads, adapter.blocks[part])


def fold_norms_(adapter: Adapter) -> None:
    """Moves every gain of a norm that linears read into them. The final norm of a tied head keeps its gain."""
    for part in parts(adapter):
        _fold_norms_(adapter, part)


def _inputs_from_stream(adapter: Adapter, part: Part) -> Iterator[tuple[Site, Any]]:
    """(input, norm) of what norms make of the residual stream; without a tied head's input, which is never folded."""
    for site in adapter.sites.of("input"):
        tied = adapter.sites.tied and site.readers == (adapter.architecture.head,)
        if site.block == part and site.norm is not None and not tied:
            yield site, adapter.module(site.norm)


def _fold_norms_(adapter: Adapter, part: Part) -> None:
    offset = adapter.architecture.gain_offset
    for site, norm in _inputs_from_stream(adapter, part):
        gain = norm.weight.double() + offset
        for path in (*site.readers, *site.beside):
            _map_inputs_(adapter.module(path), lambda w, gain=gain: w * gain)
        _set(norm, "weight", torch.ones_like(norm.weight) - offset)


class StreamBack:
    """Turns the residual stream back before the final norm, if the embedding has turned it (`QuantEmbedding.stream`).

    So a tied pair stays in coordinates of its own. The stream's width may have grown; as all norms' epsilons have then
    shrunk (see `_rotate_stream_`), so does what this one reads. Used as a hook of the norm.
    """

    def __init__(self, transform: Transform):
        self.transform, self.shrink = transform, math.sqrt(transform.in_dim / transform.out_dim)

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (self.transform.adjoint(args[0]) * self.shrink,)


def _rotate_stream_(adapter: Adapter, transform: Transform, part: Part) -> None:
    """R1, and dimension expansion if it widens. Fold the norms first; what is outside of the blocks comes first.

    RMSNorm over n' > n columns sees a mean square smaller by n/n': sqrt(n/n') goes into the linears behind it,
    and eps shrinks by n/n'. A tied pair is not touched: rows are turned when they are looked up, and the stream is
    turned back before the final norm.
    """
    row, model = adapter.architecture, adapter.model
    n, wide = transform.in_dim, transform.out_dim
    shrink = math.sqrt(n / wide)
    if part is None:
        _rotate_embedding_(adapter, transform)
    for site, norm in _inputs_from_stream(adapter, part):
        for path in (*site.readers, *site.beside):
            _map_inputs_(adapter.module(path), lambda w: transform.apply(w) * shrink)
        norm.weight = nn.Parameter(norm.weight.new_ones(wide) - row.gain_offset, requires_grad=False)
        _shrink_epsilon_(norm, row.epsilon, n / wide)
    if part is None:
        config = model.config
        if getattr(config, "head_dim", None) is None:
            config.head_dim = row.head_dim(config)
        config.hidden_size = wide
        config.rms_norm_eps *= n / wide
        return
    block = adapter.blocks[part]
    for site in block.linears():
        if site.adds_to_stream:
            _map_outputs_(adapter.module(site.module), transform.apply)
    for norm in row.norms():
        if norm.over_heads:  # the config holds one eps for all norms: shrinking what this one reads keeps it exact
            linear = block.module.get_submodule(row.writer(norm.reads).path)
            _map_outputs_(linear, lambda w: w * shrink, row.rows(norm.reads, model.config))
            _shrink_epsilon_(block.module.get_submodule(norm.path), row.epsilon, n / wide)


def _rotate_embedding_(adapter: Adapter, transform: Transform) -> None:
    row, model, wide = adapter.architecture, adapter.model, transform.out_dim
    if adapter.sites.tied:
        model.set_submodule(row.embedding, QuantEmbedding.around(adapter.embedding, transform))
        adapter.norm.register_forward_pre_hook(StreamBack(transform))
        _shrink_epsilon_(adapter.norm, row.epsilon, transform.in_dim / wide)
    else:
        grown = row.embedding_scale(model.config) / row.scale_at(wide)  # the width tells readers the scale
        _map_inputs_(adapter.embedding, lambda w: transform.apply(w) * grown)
        rescale_(adapter.embedding, row.scale_at(wide))


def _shrink_epsilon_(norm: Any, name: str, factor: float) -> None:
    setattr(norm, name, getattr(norm, name) * factor)


def _rotate_values_(adapter: Adapter, transform: Transform, block: Block) -> None:
    """R2: each head's values rotated where they are made (and in the bias), undone where attention's output is read."""
    row = adapter.architecture
    rows = row.rows(row.values, adapter.model.config)
    per_head = lambda w: transform.apply(w.unflatten(-1, (-1, transform.in_dim))).flatten(-2)  # noqa: E731
    _map_outputs_(block.module.get_submodule(row.writer(row.values).path), per_head, rows)
    for linear in row.linears():
        if linear.reads == row.attended:
            _map_inputs_(block.module.get_submodule(linear.path), per_head)


def scale_keys_(adapter: Adapter, block: Block, scale: Tensor) -> None:
    """Keys divided by scale [kv_heads, head_dim], and the queries that meet them multiplied by it, in the last modules
    that make them. A norm over single heads takes the scale of the first head.
    """
    row, config = adapter.architecture, adapter.model.config
    group = config.num_attention_heads // len(scale)
    for wire, factor in ((row.keys, 1 / scale), (row.queries, scale.repeat_interleave(group, 0))):
        maker = row.maker(wire)
        module: Any = block.module.get_submodule(maker.path)
        if isinstance(maker, Norm):
            offset, gain = row.gain_offset, (factor.flatten() if maker.whole else factor[0]).double()
            _set(module, "weight", (module.weight.double() + offset) * gain - offset)
        else:
            _map_outputs_(module, lambda w, factor=factor: w * factor.double().flatten(), row.rows(wire, config))


def rotate_input_(linear: Any, transform: Transform) -> None:
    """A linear's input columns rotated; its input must get the same transform at run time."""
    _map_inputs_(linear, transform.apply)
