"""A KV cache that stores packed codes and scales, and hands them to attention as they are.

transformers' own QuantizedCache returns the unquantized keys and values of the first update, so one long
forward through it measures no loss at all. Here whatever attention reads has been through the codes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, get_args

from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, LinearAttentionLayer

from paley.arch import FAMILIES, window
from paley.core.errors import PaleyError
from paley.core.schemes import ActivationScheme, AttentionScheme
from paley.core.transforms import Transform
from paley.model.keys import KeyBase, map_held
from paley.model.walk import HYBRID_LAYERS, PLAIN_LAYERS, has_own_cache
from paley.ops.attention import PackedKV, pack_kv

__all__ = ["PackedKVCache", "PackedKVLayer", "cache_argument", "takes_cache"]

_STEP = 64  # tokens; a store grows by an eighth, rounded up to whole steps
_LAYER_TYPES = {"full_attention", "sliding_attention"}
LayerMark = tuple[int, list[tuple[Tensor, int, int]]]  # tokens seen; of each store its data, start and end
States = dict[str, Any]  # what a layer of transformers' holds


def cache_argument(model: PreTrainedModel, cache: Cache) -> dict[str, Cache]:
    """What hands a cache to the model and to generate: `cache`, or `past_key_values` before transformers 5.24."""
    known = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in known else "past_key_values": cache}


def takes_cache(model: PreTrainedModel) -> bool:
    """Whether a model's forward takes any cache of transformers' kind, and so ours."""
    if has_own_cache(model):
        return False
    known = inspect.signature(model.forward).parameters
    place = known.get("cache") or known.get("past_key_values")
    kinds = () if place is None else (get_args(place.annotation) or (place.annotation,))
    return any(isinstance(kind, type) and issubclass(PackedKVCache, kind) for kind in kinds)


class _Store:
    """A tensor [batch, heads, tokens, n] that grows along tokens; the room behind `end` is unwritten.

    What lies before `start` has left the window, and is overwritten when the store next needs room.
    """

    def __init__(self, like: Tensor):
        self.data, self.start, self.end = like.new_empty(*like.shape[:2], 0, like.shape[3]), 0, 0

    def append(self, x: Tensor) -> None:
        if self.end + x.shape[2] > self.data.shape[2]:
            held = self.end - self.start
            needed = held + x.shape[2]
            capacity = -(-(needed + needed // 8) // _STEP) * _STEP
            grown = self.data.new_empty(*self.data.shape[:2], capacity, self.data.shape[3])
            grown[:, :, :held] = self.filled
            self.data, self.start, self.end = grown, 0, held
        self.data[:, :, self.end : self.end + x.shape[2]] = x
        self.end += x.shape[2]

    def keep_last(self, tokens: int) -> None:
        """Forgets all but the last tokens."""
        self.start = max(self.start, self.end - tokens)
        if self.data.shape[2] > 2 * (tokens + _STEP):  # the room of a long prompt
            self.data = self.filled.clone()
            self.start, self.end = 0, self.data.shape[2]

    @property
    def filled(self) -> Tensor:
        """A view of the tokens held [batch, heads, tokens, n]."""
        return self.data[:, :, self.start : self.end]


class _Side:
    """The keys or the values of one layer: packed if there is a scheme, else a plain tensor as it came."""

    def __init__(self, scheme: ActivationScheme | None, transform: Transform | None = None):
        self.scheme, self.transform = scheme, transform
        self.stores: list[_Store] = []
        self.width = 0

    def append(self, x: Tensor, base: KeyBase | None = None) -> None:
        """x [batch, kv_heads, new tokens, head_dim]; base: what it is stored without."""
        if self.scheme is None:
            parts, self.width = [x.detach()], x.shape[-1]
        else:
            packed = pack_kv(x, self.scheme, self.transform, None if base is None else base.new(x))
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
    """One attention layer's cache; keys are stored in scheme.transform's coordinates, where queries must go.

    window: tokens that the layer's attention looks back, itself included; only those are kept, as of transformers' own
    sliding layers. None: all. Keys and values are detached: no gradient flows through the cache.
    """

    is_compileable = False

    def __init__(
        self, scheme: AttentionScheme | None = None, key_base: KeyBase | None = None, window: int | None = None
    ):  # fmt: skip
        super().__init__()
        self.scheme, self.key_base, self.window = scheme or AttentionScheme(), key_base, window
        self.is_sliding = window is not None
        self.reset()

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can go back; a window that has moved on cannot."""
        return self.window is None or self._seen < self.window

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    # transformers annotates the result as two tensors; our attention function reads PackedKV too.
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """key_states, value_states [batch, kv_heads, new tokens, head_dim] -> all keys and values these may see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._seen += key_states.shape[2]
        self._keys.append(key_states, self.key_base)
        self._values.append(value_states)
        visible = self._keys.read(), self._values.read()
        if self.window is not None:
            for store in self._stores():
                store.keep_last(self.window - 1)
        return visible

    def get_seq_length(self) -> int:
        return self._seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """-> (length of what `update` will return, position of its first token)."""
        held = self._seen if self.window is None else min(self._seen, self.window - 1)
        return held + query_length, self._seen - held

    def get_max_length(self) -> int:
        return -1 if self.window is None else self.window

    def reset(self) -> None:
        self._keys = _Side(self.scheme.keys, self.scheme.key_transform)
        self._values = _Side(self.scheme.values, self.scheme.value_transform)
        self._seen = 0
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """-n forgets the last n tokens; a positive n keeps the first n, as older transformers meant it."""
        kept = min(tokens_to_remove, self._seen) if tokens_to_remove > 0 else max(self._seen + tokens_to_remove, 0)
        if kept == self._seen:
            return
        if not self.is_croppable:
            raise PaleyError(
                f"PackedKVCache: a layer keeps the last {self.window} of {self._seen} tokens and cannot go back to "
                f"{kept}; begin a new cache"
            )
        for store in self._stores():
            store.end -= self._seen - kept
        self._seen = kept

    def mark(self) -> LayerMark:
        """What is held now. Nothing is copied: a store only ever writes behind what it holds, or into new memory."""
        return self._seen, [(store.data, store.start, store.end) for store in self._stores()]

    def rewind(self, mark: LayerMark) -> None:
        """Back to a mark since which there were updates alone."""
        seen, held = mark
        if not held:
            self.reset()
            return
        for store, (data, start, end) in zip(self._stores(), held, strict=True):
            store.data, store.start, store.end = data, start, end
        self._seen = seen

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
    def nbytes_at_16_bits(self) -> int:
        """As `nbytes`, with two bytes for each value of an unquantized side."""
        sides = (self._keys, self._values)
        plain = sum(store.filled.numel() for side in sides if side.scheme is None for store in side.stores)
        return 2 * plain + sum(store.filled.nbytes for side in sides if side.scheme for store in side.stores)

    def _stores(self) -> list[_Store]:
        return self._keys.stores + self._values.stores

    def _map_data(self, f: Callable[[Tensor], Tensor]) -> None:
        for store in self._stores():
            store.data = f(store.data)


class PackedHybridLayer(LinearAttentionLayer, PackedKVLayer):
    """The cache of a layer that has attention beside states; the states are transformers', and stay as they are."""

    def __init__(self, states: int, scheme: AttentionScheme, key_base: KeyBase | None, window: int | None):
        LinearAttentionLayer.__init__(self, number_of_states=states)
        PackedKVLayer.__init__(self, scheme, key_base, window)

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        return False

    @property
    def is_croppable(self) -> bool:
        return False

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """args: keys and values. kwargs: of states."""
        if args:
            PackedKVLayer.lazy_initialization(self, *args)
        else:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    def get_max_length(self) -> int:
        return PackedKVLayer.get_max_length(self)

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        PackedKVLayer.reset(self)

    def crop(self, tokens_to_remove: int) -> None:
        raise PaleyError("PackedKVCache: a layer with states cannot go back; begin a new cache")

    def mark(self) -> Any:
        """What is held now; states, which are overwritten, are copied."""
        return PackedKVLayer.mark(self), _held(self)

    def rewind(self, mark: Any) -> None:
        packed, states = mark
        vars(self).update({name: _copied(value) for name, value in states.items() if isinstance(value, dict)})
        PackedKVLayer.rewind(self, packed)

    def reorder_cache(self, beam_idx: Any) -> None:
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        PackedKVLayer.reorder_cache(self, beam_idx)


class PackedKVCache(Cache):
    """A cache for one `generate`, or one run of forwards, of `model`; each layer as its scheme says.

    Layers without a scheme (see `attention.attach_schemes`) are kept unquantized. Grows without a maximum.
    """

    layers: list[Any]

    def __init__(self, model: PreTrainedModel):
        config = model.config.get_text_config(decoder=True)
        if config.model_type not in FAMILIES and model.config.model_type not in FAMILIES:
            super().__init__(layers=_mixed(model, config))
            return
        foreign = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
        if foreign or config.is_encoder_decoder:
            what = f"layers of type {', '.join(sorted(foreign))}" if foreign else "an encoder"
            raise PaleyError(
                f"PackedKVCache: {config.model_type} has {what}; only causal attention layers are supported"
            )
        schemes = _schemes(model, config.num_hidden_layers)
        layers: list[Any] = [
            PackedKVLayer(*schemes.get(i, (None, None)), window=window(config, i))
            for i in range(config.num_hidden_layers)
        ]
        super().__init__(layers=layers)

    def crop(self, tokens_to_remove: int) -> None:
        """As `PackedKVLayer.crop`; if a layer cannot go back, none does."""
        for layer in sorted(self.layers, key=lambda layer: layer.is_croppable):
            layer.crop(tokens_to_remove)

    def mark(self) -> list[LayerMark | States]:
        """What is held now, without a copy of keys and values, for `rewind`."""
        return [layer.mark() if isinstance(layer, PackedKVLayer) else _held(layer) for layer in self.layers]

    def rewind(self, mark: list[Any]) -> None:
        """Undoes the updates since a mark, also in layers with a window, and those of a forward that stopped midway.

        A mark can be gone back to again and again: states of it are copied each time.
        """
        for layer, held in zip(self.layers, mark, strict=True):
            if isinstance(layer, PackedKVLayer):
                layer.rewind(held)
            else:
                vars(layer).clear()
                vars(layer).update(_copies(held))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        map_held(self, lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        map_held(self, lambda rows: rows[indices.to(rows.device)])

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        map_held(self, lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens held, over all layers; without the room for coming ones, and a position for each."""
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, PackedKVLayer))


def _held(layer: Any) -> States:
    """The attributes of a layer of transformers': keys and values are replaced by updates, states are overwritten."""
    return _copies(vars(layer))


def _copies(attributes: States) -> States:
    return {name: _copied(value) if isinstance(value, dict) else value for name, value in attributes.items()}


def _copied(states: dict[int, Any]) -> dict[int, Any]:
    return {index: state.clone() if isinstance(state, Tensor) else state for index, state in states.items()}


def _schemes(model: PreTrainedModel, layers: int) -> dict[int, tuple[AttentionScheme, KeyBase | None]]:
    """What each layer of a cache is to be packed by, as attentions were told."""
    schemes: dict[int, tuple[AttentionScheme, KeyBase | None]] = {}
    for name, module in model.named_modules():
        if (scheme := getattr(module, "kv_scheme", None)) is None:
            continue
        index = int(module.layer_idx)  # type: ignore[arg-type]
        if not 0 <= index < layers or index in schemes:
            raise PaleyError(f"PackedKVCache: {name} claims cache layer {index}, which is taken or does not exist")
        schemes[index] = scheme, getattr(module, "key_base", None)
    return schemes


def _mixed(model: PreTrainedModel, config: Any) -> list[Any]:
    """Of a model without a row: transformers' own layers (of states, windows, chunks), packed ones where asked for."""
    layers: list[Any] = list(DynamicCache(config=config).layers)
    layers += [DynamicLayer() for _ in range(config.num_hidden_layers - len(layers))]
    for index, (scheme, base) in _schemes(model, len(layers)).items():
        if scheme.keys is None and scheme.values is None:
            continue
        was = layers[index]
        looks_back = getattr(was, "sliding_window", None)
        if type(was) in PLAIN_LAYERS:
            layers[index] = PackedKVLayer(scheme, base, window=looks_back)
        elif type(was) in HYBRID_LAYERS:
            layers[index] = PackedHybridLayer(was.number_of_states, scheme, base, looks_back)
        else:
            raise PaleyError(
                f"PackedKVCache: layer {index} of this {config.model_type} is a {type(was).__name__}; leave "
                "its keys and values unquantized"
            )
    return layers
