"""An embedding that keeps its rows packed, and turns what it looks up into a rotated residual stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from paley.core.rounding import Quantized
from paley.core.schemes import LinearScheme
from paley.core.transforms import Transform
from paley.model.coded import Coded
from paley.ops.embedding import embed

__all__ = ["QuantEmbedding", "rescale_", "scale_of"]


class QuantEmbedding(Coded):
    """ids [...] -> S(row · scale) [..., width of the stream], with rows [vocab, hidden] as `Coded` holds them.

    A row is stored turned by scheme.transform and turned back when it is looked up. scale: what the family multiplies
    rows by. stream: S, what turns the residual stream of a model whose head shares the rows; None: nothing does.
    """

    def __init__(
        self,
        rows: int,
        width: int,
        scheme: LinearScheme,
        *,
        scale: float = 1.0,
        stream: Transform | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        name: str = "QuantEmbedding",
    ):
        """width: of the stored rows; dtype: of what is looked up, and of rows left unquantized."""
        super().__init__(rows, width, scheme, dtype=dtype, device=device, name=name)
        self.scale, self.stream, self.dtype = scale, stream, dtype

    @classmethod
    def around(
        cls, embedding: Any, stream: Transform | None, scheme: LinearScheme | None = None,
        q: Quantized | None = None, *, name: str = "QuantEmbedding",
    ) -> QuantEmbedding:  # fmt: skip
        """In place of an nn.Embedding or QuantEmbedding: with its own rows (q None), or with codes of them."""
        rows, width = embedding.weight.shape if q is None else (q.codes.shape[0], q.width)
        dtype, device = embedding.weight.dtype, embedding.weight.device
        made = cls(
            rows, width, scheme or LinearScheme(), scale=scale_of(embedding), stream=stream, dtype=dtype,
            device="meta" if q is None else device, name=name,
        )  # fmt: skip
        if q is None:
            made.weight = embedding.weight  # the very parameter, which a tied head shares
        else:
            made.set_quantized_(q)
        return made

    @torch.compiler.disable  # as of QuantLinear
    def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]
        if self.scheme.weight is None:
            assert self.weight is not None
            rows = nn.functional.embedding(ids, self.weight)
        else:
            parts = {name: part for name, part in self.named_buffers() if part is not None}
            rows = embed(ids, parts, self.scheme, self.width, self.dtype)
        if self.scale != 1.0:
            rows = rows * torch.tensor(self.scale, dtype=rows.dtype)  # rounded to the model's type, as the family does
        return rows if self.stream is None else self.stream.apply(rows)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.dtype = fn(torch.zeros((), dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"{self.rows}, {self.width}, weight={self.scheme.weight.grid.name if self.scheme.weight else 'float'}"


def rescale_(embedding: Any, scale: float) -> None:
    """Makes an embedding of transformers that multiplies its rows do so by another number."""
    if hasattr(embedding, "scalar_embed_scale"):
        embedding.scalar_embed_scale = scale
        embedding.embed_scale = torch.tensor(scale, dtype=embedding.embed_scale.dtype)


def scale_of(embedding: Any) -> float:
    """What an embedding of transformers, or ours, multiplies its rows by."""
    if isinstance(embedding, QuantEmbedding):
        return embedding.scale
    return float(getattr(embedding, "scalar_embed_scale", 1.0))
