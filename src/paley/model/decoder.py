"""A decoder on a transformers model: each context is a PackedKVCache, if the model can go on from one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from paley.core.errors import PaleyError
from paley.model.kv_cache import PackedKVCache, cache_argument
from paley.model.loading import context_of
from paley.model.pieces import pieces_of

__all__ = ["ModelContext", "ModelDecoder", "TextContext"]


class ModelContext:
    """One text in a cache of its own. length: tokens read so far."""

    def __init__(self, model: PreTrainedModel):
        self._cache: PackedKVCache | None = PackedKVCache(model)
        self.length = 0  # not every cache knows: states have none

    @property
    def cache(self) -> PackedKVCache:
        if self._cache is None:
            raise PaleyError("context: it was closed; start a new one")
        return self._cache

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens held."""
        return self.cache.nbytes

    def truncate(self, length: int) -> None:
        """Forgets all tokens from place `length` on; PaleyError where a layer's window has moved beyond it."""
        if not 0 <= length <= self.length:
            raise PaleyError(f"context: holds {self.length} tokens", got=length)
        if length < self.length:
            self.cache.crop(length - self.length)
            self.length = length

    def close(self) -> None:
        """Frees the cache."""
        self._cache = None


class TextContext:
    """One text of a model that cannot go on from a cache (RWKV, XLNet, BERT): its tokens, read again each time."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    @property
    def length(self) -> int:
        """Tokens read so far."""
        return len(self.tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values held: none."""
        return 0

    def truncate(self, length: int) -> None:
        """Forgets all tokens from place `length` on."""
        if not 0 <= length <= self.length:
            raise PaleyError(f"context: holds {self.length} tokens", got=length)
        del self.tokens[length:]

    def close(self) -> None:
        """Forgets all."""
        self.tokens = []


class ModelDecoder:
    """Reads each part in a forward of its own, so that no row depends on its neighbours."""

    def __init__(self, model: PreTrainedModel):
        self.model = model

    @property
    def vocabulary(self) -> int:
        """Number of logits."""
        return self.model.config.vocab_size

    @property
    def limit(self) -> int | None:
        """How many tokens the model reads; None if its config does not say."""
        return context_of(self.model.config)

    def start(self) -> ModelContext | TextContext:
        """An empty context."""
        return ModelContext(self.model) if pieces_of(self.model).cache else TextContext()

    @torch.no_grad()
    def read(self, parts: Sequence[tuple[Any, Sequence[int]]]) -> Tensor:
        """See `pipeline.decoder.Decoder.read`; the contexts are those of `start`, the logits on the CPU."""
        self._check(parts)
        caches = [context.cache for context, _ in parts if isinstance(context, ModelContext)]
        marks = [(cache, cache.mark()) for cache in caches]
        try:
            rows = [self._last_logits(context, tokens) for context, tokens in parts]
        except BaseException:
            for cache, mark in marks:
                cache.rewind(mark)
            raise
        for context, tokens in parts:
            if isinstance(context, TextContext):
                context.tokens += tokens
            else:
                context.length += len(tokens)
        return torch.stack(rows)

    def _last_logits(self, context: ModelContext | TextContext, tokens: Sequence[int]) -> Tensor:
        """float32 [vocabulary]"""
        if isinstance(context, TextContext):
            ids = torch.tensor([[*context.tokens, *tokens]], device=self.model.device)
            return self.model(ids, use_cache=False).logits[0, -1].float().cpu()
        ids = torch.tensor([list(tokens)], device=self.model.device)
        cache, logits = cache_argument(self.model, context.cache), torch.empty(1, 1, 0)
        for part, more in pieces_of(self.model).parts(ids, context.length):
            logits = self.model(part, use_cache=True, logits_to_keep=1, **more, **cache).logits
        return logits[0, -1].float().cpu()

    def _check(self, parts: Sequence[tuple[ModelContext | TextContext, Sequence[int]]]) -> None:
        if not parts or len({id(context) for context, _ in parts}) < len(parts):
            raise PaleyError("decoder: wants at least one part, and no context twice")
        for context, tokens in parts:
            if not tokens or not 0 <= min(tokens) <= max(tokens) < self.vocabulary:
                raise PaleyError(f"decoder: wants one or more tokens from 0 to {self.vocabulary - 1}")
            if self.limit is not None and context.length + len(tokens) > self.limit:
                raise PaleyError(
                    f"decoder: a context of {context.length} tokens and {len(tokens)} more are beyond the {self.limit} "
                    "that this model reads"
                )
