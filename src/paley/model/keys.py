"""What the keys of a head have in common: taken off before they are rounded, added back when they are read.

k_n = RoPE_n(W x + b). RoPE turns b, and the mean of W x, with the position n: a mean over positions loses them, and
every key keeps their energy. RoPE_n(m) follows from the position of a key, so a cache needs no more bits for it.
The first token of a text has a mean of its own: its key draws most of the attention, and is unlike all others.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import Cache, PreTrainedModel

from paley.arch import FAMILIES, Architecture, family, rope_follows_length
from paley.core.errors import PaleyError
from paley.core.schemes import AttentionScheme
from paley.core.transforms import Transform

__all__ = ["MEAN_KEYS", "KeyBase", "attach_base_", "map_held", "turn"]

# Buffers of an attention: of the first token and of all others [2, kv_heads, head_dim], before RoPE; and after it, of
# all [kv_heads, head_dim].
MEAN_KEYS = ("key_offset", "key_mean")
Table = tuple[Tensor, Tensor]  # cos and sin, [1 or batch, tokens, turned values of a head]
_HELD = "paley_held"  # the attribute of a cache that says where its tokens are


def turn(x: Tensor, table: Table, *, back: bool = False) -> Tensor:
    """x [..., heads, 1 or tokens, head_dim] -> RoPE of it [1 or batch, heads, tokens, head_dim]; back: its adjoint.

    Values of a head beyond the table's width are not turned.
    """
    beyond = x.shape[-1] - table[0].shape[-1]
    cos, sin = (pad(t.to(x), (0, beyond), value=fill)[:, None] for t, fill in zip(table, (1.0, 0.0), strict=True))
    turned, rest = x.split((x.shape[-1] - beyond, beyond), -1)
    a, b = turned.chunk(2, -1)
    return x * cos + torch.cat([b, -a, rest] if back else [-b, a, rest], -1) * sin


@dataclass
class _Held:
    """Where the tokens of a cache are [1 or batch, tokens]; new: those of the last forward, which tell it from others.

    tables: cos and sin there, by the type of the layers.
    """

    positions: Tensor
    new: Tensor | None
    tables: dict[tuple[str | None, bool], Table] = field(default_factory=dict)


class KeyBase:
    """What one attention's keys are stored without, given where the tokens of a forward are.

    transform: of the coordinates in which keys are rounded. rotary: the model's own module that makes cos and sin;
    layer_type: which of its tables, if it has some. turns: whether what is taken off is turned as RoPE turns keys.
    bias: path of the linear some of whose bias, `rows`, it is, in place of a buffer of the attention.
    """

    def __init__(
        self, attention: Any, row: Architecture, transform: Transform | None, rotary: nn.Module, layer_type: str | None,
        *, turns: bool, bias: str | None, rows: slice,
    ):  # fmt: skip
        self._attention, self._transform, self._rotary, self._layer_type = attention, transform, rotary, layer_type
        self.turns, self._bias, self._rows, self._row = turns, bias, rows, row
        self._has_rope = row.has_rope(attention.config, attention.layer_idx)
        self._key = self._layer_type, self._has_rope  # of tables that layers share
        self._new: _Held | None = None
        self._held: _Held | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> KeyBase:
        """A copied attention gets its own; a copied cache goes on with that of the model."""
        if (attention := memo.get(id(self._attention))) is None:
            return self
        made = copy.copy(self)
        made._attention, made._new, made._held = attention, None, None
        return made

    def see(self, table: Table, positions: Tensor | None, cache: Any) -> None:
        """Notes where the tokens of this forward are, and those before them in its cache, which has not got them yet.

        table: cos and sin at the positions [1 or batch, tokens].
        """
        if positions is None:
            raise PaleyError("attention: transformers gave no position_ids, and keys are stored by position; update it")
        self._new = self._held = _Held(positions, None, {self._key: self._doubled(table)})
        seen = 0 if cache is None else int(cache.get_seq_length(self._attention.layer_idx))
        if cache is None:
            return
        held = getattr(cache, _HELD, None)
        if held is None or held.new is not positions or held.positions.shape[1] != seen + positions.shape[1]:
            before = positions[:, :0] if held is None else held.positions[:, :seen]
            held = _Held(_join(before, positions, seen), positions)
            setattr(cache, _HELD, held)
        if seen:
            self._held = held

    @property
    def width(self) -> int:
        """The values of a head that RoPE turns."""
        assert self._new is not None
        return self._new.tables[self._key][0].shape[-1]

    def halved(self, x: Tensor) -> Tensor:
        """x [..., head_dim] with pairs that RoPE turns together at (i, i + width / 2), wherever the family has them."""
        return self._reordered(x, lambda part: part.unflatten(-1, (-1, 2)).mT.flatten(-2))

    def unhalved(self, x: Tensor) -> Tensor:
        """Undoes `halved`."""
        return self._reordered(x, lambda part: part.unflatten(-1, (2, -1)).mT.flatten(-2))

    def _reordered(self, x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
        if self._row.rotary_pairs == "halves" or not (self._has_rope and self.turns):
            return x
        width = self.width
        return torch.cat([f(x[..., :width]), x[..., width:]], -1)

    def _doubled(self, table: Table) -> Table:
        """The model's cos and sin with each angle once for each value of its pair; no turn without RoPE."""
        cos, sin = table
        if not self._has_rope:
            shape = (*cos.shape[:-1], self._attention.head_dim)
            return cos.new_ones(shape), sin.new_zeros(shape)
        return (torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)) if self._row.rotary_half else table

    def back(self, keys: Tensor) -> Tensor:
        """keys [batch, kv_heads, tokens, head_dim] of this forward -> float64, as they were before RoPE, `halved`."""
        assert self._new is not None
        cos, sin = (part.double() for part in self._new.tables[self._key])
        square = cos.square() + sin.square()  # 1, unless RoPE scales what it turns
        return turn(self.halved(keys.double()), (cos / square, sin / square), back=True)

    def new(self, like: Tensor) -> Tensor:
        """For the keys of this forward's tokens [1 or batch, kv_heads, tokens, width], in `like`'s dtype."""
        return self._at(self._new, like.shape[2], like)

    def held(self, tokens: int, like: Tensor) -> Tensor:
        """For all `tokens` keys that attention reads; a cache's room behind the last one is masked."""
        return self._at(self._held, tokens, like)

    def scores(self, query: Tensor, tokens: int) -> Tensor | None:
        """query [batch, heads, 1, head_dim] times what `held` gives -> [batch, heads, 1, tokens], up to a constant.

        It turns nothing: q . RoPE_n(m) is linear in cos and sin. None: it is a constant.
        """
        if not self.turns:
            return None
        assert self._held is not None
        cos, sin = self._table(self._held, tokens, query)
        width, groups = cos.shape[-1], query.shape[1] // self._offsets().shape[1]
        query = self.halved(query)
        first, others = self.halved(self._offsets().to(query)).repeat_interleave(groups, 1)[:, :, None]
        a, b = others[..., :width].chunk(2, -1)
        turned = query[..., :width]
        cos, sin = cos.to(query), sin.to(query)
        by_cos, by_sin = turned * others[..., :width], turned * torch.cat([-b, a], -1)
        found = by_cos @ cos[:, None].mT + by_sin @ sin[:, None].mT
        start, apart = self._starts(self._held, tokens)[:, None, None], query * (first - others)
        found = found + start * (apart[..., :width] @ cos[:, None].mT + apart[..., width:].sum(-1, keepdim=True))
        return pad(found, (0, tokens - found.shape[-1]))

    def _table(self, held: _Held, tokens: int, like: Tensor) -> Table:
        """cos and sin of the last tokens."""
        if self._key not in held.tables:
            kind = [] if self._layer_type is None else [self._layer_type]
            held.tables[self._key] = self._doubled(self._rotary(like, held.positions, *kind))
        cos, sin = held.tables[self._key]
        return cos[:, -tokens:], sin[:, -tokens:]

    def _starts(self, held: _Held, tokens: int) -> Tensor:
        """[1 or batch, tokens]: whether it is the first token of a text."""
        return held.positions[:, -tokens:] == 0

    def _at(self, held: _Held | None, tokens: int, like: Tensor) -> Tensor:
        if not self.turns:
            base = self._attention.key_mean.to(like)[None, :, None]
        else:
            assert held is not None, "attention was called without its forward"
            first, others = self._offsets().to(like)[:, :, None]
            starts = self._starts(held, tokens)[:, None, :, None]
            placed = self.halved(torch.where(starts, first, others))  # RoPE may scale what it turns, also there
            base = self.unhalved(turn(placed, self._table(held, tokens, like)))
            base = pad(base, (0, 0, 0, tokens - base.shape[2]))
        return base if self._transform is None else self._transform.apply(base)

    def _offsets(self) -> Tensor:
        """[2, kv_heads, head_dim], before RoPE: of the first token, and of all others."""
        if self._bias is None:
            return self._attention.key_offset
        bias = self._attention.get_submodule(self._bias).bias[self._rows]
        return bias.unflatten(-1, (-1, self._attention.head_dim)).expand(2, -1, -1)


def _join(before: Tensor, new: Tensor, seen: int) -> Tensor:
    """Positions [1 or batch, tokens] of the tokens that a cache holds, and of the new ones."""
    if before.shape[1] < seen:
        raise PaleyError(
            "attention: the cache holds tokens whose positions were not noted, and keys are stored by position; fill a "
            "new cache with this model"
        )
    rows = max(len(before), len(new))
    if not {len(before), len(new)} <= {1, rows}:
        raise PaleyError(f"attention: the cache has {len(before)} rows, the new tokens {len(new)}; begin a new cache")
    return torch.cat([before.expand(rows, -1), new.expand(rows, -1)], 1)


def map_held(cache: Cache, rows: Callable[[Tensor], Tensor]) -> None:
    """Does to the positions of a cache what is done to its rows [batch, ...]."""
    if (held := getattr(cache, _HELD, None)) is not None and len(held.positions) > 1:
        setattr(cache, _HELD, _Held(rows(held.positions), None))


def attach_base_(model: PreTrainedModel, attention: Any, scheme: AttentionScheme | None) -> None:
    """Gives an attention what its scheme takes off keys: zeros, to be measured or read from a file, or a bias."""
    center = scheme.center_keys if scheme is not None and scheme.keys is not None else False
    if model.config.model_type not in FAMILIES:
        if center:
            raise PaleyError(f"center_keys={center!r}: needs a row for {model.config.model_type!r}; set it to false")
        attention.key_base = attention.key_hook = None
        return
    shape = int(attention.config.num_key_value_heads), int(attention.head_dim)
    device = next(chain(attention.parameters(), attention.buffers())).device
    attention.register_buffer("key_offset", torch.zeros(2, *shape, device=device) if center == "mean" else None)
    attention.register_buffer("key_mean", torch.zeros(shape, device=device) if center is True else None)
    if (hook := getattr(attention, "key_hook", None)) is not None:
        hook.remove()
    attention.key_base = attention.key_hook = None
    if scheme is None or not center:
        return
    row, turns, bias, rows = family(model.config.model_type), center is not True, None, slice(None)
    if turns and rope_follows_length(model.config):
        raise PaleyError(f"center_keys={center!r}: this model's RoPE depends on the length of the text; set it to true")
    if center == "bias":
        bias = row.maker(row.keys).path.removeprefix(f"{row.attention}.")
        rows = row.rows(row.keys, attention.config)
        if getattr(attention.get_submodule(bias), "bias", None) is None:
            raise PaleyError(f"center_keys='bias': {bias} has none in this model; set it to false")
    rotary = model.get_submodule(row.rotary)
    by_type = "layer_type" in inspect.signature(rotary.forward).parameters
    layer_type = attention.config.layer_types[attention.layer_idx] if by_type else None
    attention.key_base = KeyBase(
        attention, row, scheme.transform, rotary, layer_type, turns=turns, bias=bias, rows=rows
    )  # fmt: skip
    if turns:
        attention.key_hook = attention.register_forward_pre_hook(_see, with_kwargs=True)


def _see(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A hook before the attention's forward. transformers 5.24 calls a cache so; before, it had the other name."""
    cache = kwargs.get("cache")
    cache = kwargs.get("past_key_values") if cache is None else cache
    attention.key_base.see(kwargs["position_embeddings"], kwargs.get("position_ids"), cache)
