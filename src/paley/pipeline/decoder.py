"""What reads tokens and gives logits, with a KV cache for each text: `generate`, `chat` and `serve` know no more.

The transformers path and the native engine are both decoders; they need not import this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

__all__ = ["Context", "Decoder"]


class Context(Protocol):
    """One text that is being read, as its cache."""

    @property
    def length(self) -> int:
        """Tokens read so far."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of the cache."""
        ...

    def truncate(self, length: int) -> None:
        """Forgets all tokens from place `length` on; PaleyError if the cache no longer holds what came before."""
        ...

    def close(self) -> None:
        """Frees the cache; a second time does nothing."""
        ...


class Decoder(Protocol):
    """A loaded model. One thread at a time calls it."""

    @property
    def vocabulary(self) -> int:
        """Number of logits."""
        ...

    @property
    def limit(self) -> int | None:
        """The most tokens that a context holds; None if the model does not say."""
        ...

    def start(self) -> Context:
        """An empty context."""
        ...

    def read(self, parts: Sequence[tuple[Context, Sequence[int]]]) -> Tensor:
        """Adds one or more tokens to each context (no context twice) -> float32 [len(parts), vocabulary].

        A row holds the logits after the part's last token, and is the same whatever other parts there are. If it
        raises, or is interrupted, no context has changed its length.
        """
        ...
