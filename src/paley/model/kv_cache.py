"""A KV cache that stores packed codes and scales, and hands them to attention as they are.

transformers' own QuantizedCache returns the unquantized keys and values of the first update, so one long
forward through it measures no loss at all. Here whatever attention reads has been through the codes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from paley.core import packing, rounding
from paley.core.errors import PaleyError
from paley.core.schemes import ActivationScheme, AttentionSlot
from paley.core.transforms import Transform

__all__ = ["PackedKV", "PackedKVCache", "PackedKVLayer", "cache_argument", "pack_kv"]

SCALE_DTYPE = torch.float16
_STEP = 64  # tokens; a store grows by an eighth, rounded up to whole steps
_LAYER_TYPES = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class PackedKV:
    """Keys or values [batch, kv_heads, tokens, width] as stored, after `transform`.

    codes uint8 [batch, kv_heads, tokens, bytes]; scales float16 [batch, kv_heads, tokens,
    groups]; zeros uint8, shaped as scales, on affine grids only.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    width: int
    scheme: ActivationScheme
    transform: Transform | None = None

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.codes.shape[:-1], self.width))

    @property
    def nbytes(self) -> int:
        """Bytes of these tokens' codes, scales and zeros."""
        return sum(t.nbytes for t in self.parts())

    def parts(self) -> list[Tensor]:
        """codes, scales, and zeros where there are any."""
        return [t for t in (self.codes, self.scales, self.zeros) if t is not None]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """-> [batch, kv_heads, tokens, width] in `dtype`, still in transform's coordinates."""
        grid = self.scheme.grid
        codes = packing.unpack_codes(self.codes, grid.size, rounding.codes_per_row(self.width, grid.p))
        return grid.dequantize(codes, self.scales, self.zeros, self.width).to(dtype)


def cache_argument(model: PreTrainedModel, cache: Cache) -> dict[str, Cache]:
    """What hands a cache to the model and to generate: `cache`, or `past_key_values` before transformers 5.24."""
    known = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in known else "past_key_values": cache}


def pack_kv(x: Tensor, scheme: ActivationScheme, transform: Transform | None = None) -> PackedKV:
    """x [batch, kv_heads, tokens, head_dim] -> codes and scales per token and head (and group), detached."""
    x = x.detach()
    if transform is not None:
        x = transform.apply(x)
    q = rounding.quantize_dynamic(x.contiguous(), scheme, SCALE_DTYPE)  # uneven grids are searched in contiguous rows
    codes = packing.pack_codes(q.codes, scheme.grid.size)
    return PackedKV(codes, q.scales, q.zeros, x.shape[-1], scheme, transform)


def centered(keys: Tensor, slot: AttentionSlot, mean: Tensor | None) -> Tensor:
    """keys [batch, kv_heads, tokens, head_dim] less mean [kv_heads, head_dim], where the slot asks for it."""
    if slot.keys is None or not slot.center_keys or mean is None:
        return keys
    return keys - mean.to(keys.dtype)[:, None]


class _Store:
    """A tensor [batch, heads, tokens, n] that grows along tokens; the room behind `length` is unwritten."""

    def __init__(self, like: Tensor):
        self.data, self.length = like.new_empty(*like.shape[:2], 0, like.shape[3]), 0

    def append(self, x: Tensor) -> None:
        end = self.length + x.shape[2]
        if end > self.data.shape[2]:
            capacity = -(-(end + end // 8) // _STEP) * _STEP
            grown = self.data.new_empty(*self.data.shape[:2], capacity, self.data.shape[3])
            grown[:, :, : self.length] = self.filled
            self.data = grown
        self.data[:, :, self.length : end] = x
        self.length = end

    @property
    def filled(self) -> Tensor:
        """A view of the written tokens [batch, heads, length, n]."""
        return self.data[:, :, : self.length]


class _Side:
    """The keys or the values of one layer: packed if there is a scheme, else a plain tensor as it came."""

    def __init__(self, scheme: ActivationScheme | None, transform: Transform | None = None):
        self.scheme, self.transform = scheme, transform
        self.stores: list[_Store] = []
        self.width = 0

    def append(self, x: Tensor) -> None:
        """x [batch, kv_heads, new tokens, head_dim]."""
        if self.scheme is None:
            parts, self.width = [x.detach()], x.shape[-1]
        else:
            packed = pack_kv(x, self.scheme, self.transform)
            parts, self.width = packed.parts(), packed.width
        if not self.stores:
            self.stores = [_Store(part) for part in parts]
        for store, part in zip(self.stores, parts, strict=True):
            store.append(part)

    def read(self) -> PackedKV | Tensor:
        """All tokens so far."""
        parts = [store.filled for store in self.stores]
        if self.scheme is None:
            return parts[0]
        zeros = parts[2] if len(parts) == 3 else None
        return PackedKV(parts[0], parts[1], zeros, self.width, self.scheme, self.transform)


class PackedKVLayer(CacheLayerMixin):
    """One attention layer's cache; keys are stored in slot.transform's coordinates, where queries must go.

    A sliding-window layer keeps all its tokens as well: the mask, sized by `get_mask_sizes`, hides those
    outside the window. Keys and values are detached: no gradient flows through the cache.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True

    def __init__(self, slot: AttentionSlot | None = None, key_mean: Tensor | None = None):
        super().__init__()
        self.slot, self.key_mean = slot or AttentionSlot(), key_mean
        self.reset()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    # transformers annotates the result as two tensors; our attention function reads PackedKV too.
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """key_states, value_states [batch, kv_heads, new tokens, head_dim] -> all tokens' keys, values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._keys.append(centered(key_states, self.slot, self.key_mean))
        self._values.append(value_states)
        return self._keys.read(), self._values.read()

    def get_seq_length(self) -> int:
        return self._stores()[0].length if self._stores() else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """-> (length of what `update` will return, position of its first token)."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self._keys = _Side(self.slot.keys, self.slot.transform)
        self._values = _Side(self.slot.values)
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """-n forgets the last n tokens; a positive n keeps the first n, as older transformers meant it."""
        length = self.get_seq_length()
        kept = min(tokens_to_remove, length) if tokens_to_remove > 0 else max(length + tokens_to_remove, 0)
        for store in self._stores():
            store.length = kept

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map_data(lambda data: data.index_select(0, beam_idx.to(data.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_data(lambda data: data.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map_data(lambda data: data[indices.to(data.device)])

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens held: codes, scales, zeros, or the plain tensors of an unquantized side."""
        return sum(store.filled.nbytes for store in self._stores())

    @property
    def allocated_nbytes(self) -> int:
        """`nbytes` and the room kept for coming tokens."""
        return sum(store.data.nbytes for store in self._stores())

    def _stores(self) -> list[_Store]:
        return self._keys.stores + self._values.stores

    def _map_data(self, f: Callable[[Tensor], Tensor]) -> None:
        for store in self._stores():
            store.data = f(store.data)


class PackedKVCache(Cache):
    """A cache for one `generate`, or one run of forwards, of `model`; each layer as its slot says.

    Layers without a slot (see `attention.attach_slots`) are kept unquantized. Grows without a maximum.
    """

    layers: list[PackedKVLayer]

    def __init__(self, model: PreTrainedModel):
        config = model.config.get_text_config(decoder=True)
        foreign = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
        if foreign or config.is_encoder_decoder:
            what = f"layers of type {', '.join(sorted(foreign))}" if foreign else "an encoder"
            raise PaleyError(
                f"PackedKVCache: {config.model_type} has {what}; only causal attention layers are supported"
            )
        slots: dict[int, tuple[AttentionSlot, Tensor | None]] = {}
        for name, module in model.named_modules():
            if (slot := getattr(module, "kv_slot", None)) is None:
                continue
            index = int(module.layer_idx)  # type: ignore[arg-type]
            if not 0 <= index < config.num_hidden_layers or index in slots:
                raise PaleyError(f"PackedKVCache: {name} claims cache layer {index}, which is taken or does not exist")
            slots[index] = slot, getattr(module, "key_mean", None)
        layers: list[Any] = [PackedKVLayer(*slots.get(i, (None, None))) for i in range(config.num_hidden_layers)]
        super().__init__(layers=layers)

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens held, over all layers; `allocated_nbytes` adds the room for coming ones."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def allocated_nbytes(self) -> int:
        return sum(layer.allocated_nbytes for layer in self.layers)
