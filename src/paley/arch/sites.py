"""Sites: every place of a model where a tensor can be quantized, in the order of computation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from paley.arch.row import HEAD_INPUT, STREAM, Architecture, Linear, window

__all__ = ["Kind", "Site", "Sites", "head_input", "sites"]

Kind = Literal["embedding", "input", "linear", "keys", "values", "head"]


@dataclass(frozen=True)
class Site:
    """A place where a tensor can be quantized.

    name: a module's path for embedding, linear and head; BLOCK.wire for input, keys and values.
    shape: [out, in] of a weight ([vocab, hidden] of the embedding), [width] of an input, [heads, head_dim] of a cache.
    block: its number; None for embedding, head and the head's input.
    module: path of the module it belongs to: itself, the attention, or "" for an input.
    reads: of a linear and the head, the name of their input's site. readers: of an input, the linears that read it.
    writes: of a linear, the wire; STREAM if it adds to the residual stream.
    norm: of an input, path of the norm that makes it; of a linear that adds to the stream, of the norm that reads the
    stream just before. made_by: of keys and values, path of the last module that makes them: a linear, or a norm; and
    rows: which of its outputs they are. fused: of a linear that makes several wires, these.
    window: of keys and values, the tokens that a layer keeps of them; None: all.
    stored_as: the name of its tensors in a file: of a tied head, the embedding's.
    tensor: of a weight, the name of the tensor that holds it in the original, and where it stays unquantized.
    experts: how many matrices a stack of experts has; its shape is that of all of them below each other. transposed:
    the tensor holds [in, out], of each expert. fixed: why it must stay unquantized; "" if it need not.
    beside: of an input, paths of routers that read it, too, and are never quantized.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    block: int | None
    module: str
    reads: str | None = None
    readers: tuple[str, ...] = ()
    writes: str | None = None
    norm: str | None = None
    made_by: str | None = None
    rows: tuple[int, int] | None = None
    fused: tuple[str, ...] = ()
    window: int | None = None
    stored_as: str = ""
    tensor: str = ""
    experts: int = 0
    transposed: bool = False
    fixed: str = ""
    beside: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.tensor and self.is_weight:
            object.__setattr__(self, "tensor", f"{self.name}.weight")

    def tokens(self, context: int) -> int:
        """How many tokens a cache holds here after `context` of them."""
        return context if self.window is None else min(context, self.window)

    @property
    def is_weight(self) -> bool:
        return self.kind in ("embedding", "linear", "head")

    def makes(self, wire: str) -> bool:
        """Whether a linear makes this wire, alone or among others."""
        return wire == self.writes or wire in self.fused

    @property
    def adds_to_stream(self) -> bool:
        return self.writes == STREAM

    @property
    def numel(self) -> int:
        """Entries of a weight; values that a token has there of the other kinds."""
        found = 1
        for size in self.shape:
            found *= size
        return found


class Sites(Mapping[str, Site]):
    """The sites of one model by name, in order of computation. kept: linears that are none, and why."""

    def __init__(
        self, architecture: Architecture, found: Iterator[Site], *, tied: bool, kept: Mapping[str, str] | None = None
    ):  # fmt: skip
        self.architecture, self.tied, self.kept = architecture, tied, kept or {}
        self._sites = {site.name: site for site in found}

    def __getitem__(self, name: str) -> Site:
        return self._sites[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def of(self, *kinds: Kind, block: int | None = None) -> list[Site]:
        """The sites of these kinds, of one block or of all the model."""
        return [s for s in self._sites.values() if s.kind in kinds and (block is None or s.block == block)]

    @property
    def weights(self) -> list[Site]:
        """Every weight that a file stores once: without a tied head."""
        return [s for s in self._sites.values() if s.is_weight and s.stored_as == s.name]

    def held_as(self, site: Site) -> set[str]:
        """Names of the tensors of the original that a weight is: a tied pair has two."""
        return {site.tensor} | ({self.head.tensor} if self.tied and site.kind == "embedding" else set())

    @property
    def embedding(self) -> Site:
        return self.of("embedding")[0]

    @property
    def head(self) -> Site:
        return self.of("head")[0]

    @property
    def blocks(self) -> int:
        return 1 + max((s.block for s in self._sites.values() if s.block is not None), default=-1)

    def attention(self, block: int) -> str:
        """Path of a block's attention module; "" if it has none whose cache can be quantized."""
        return next((site.module for site in self.of("keys", block=block)), "")

    def reads_stream(self, site: Site) -> bool:
        """Whether a linear or the head reads the residual stream, through a norm."""
        return site.reads is not None and self[site.reads].norm is not None

    def shape_in(self, site: Site, width: int | None) -> tuple[int, int]:
        """[out, in] of a weight in a residual stream of `width` (None: as it is). A tied pair keeps its own width."""
        rows, columns = site.shape
        if width is None or (self.tied and site.kind != "linear"):
            return rows, columns
        if site.kind == "embedding" or self.reads_stream(site):
            columns = width
        return width * max(1, site.experts) if site.adds_to_stream else rows, columns


def sites(architecture: Architecture, config: Any) -> Sites:
    """Every site of the model that a row and a config (transformers', or anything like it) describe."""
    return Sites(architecture, _walk(architecture, config), tied=bool(config.tie_word_embeddings))


def head_input(row: Architecture, width: int) -> Site:
    """What the head reads."""
    return Site(HEAD_INPUT, "input", (width,), None, "", readers=(row.head,), norm=row.norm or None)


def _walk(row: Architecture, config: Any) -> Iterator[Site]:
    sizes = row.sizes(config)
    hidden, vocabulary = sizes[STREAM], config.vocab_size
    yield Site(row.embedding, "embedding", (vocabulary, hidden), None, row.embedding, stored_as=row.embedding)
    for index in range(config.num_hidden_layers):
        block = row.at(config, index)
        yield from _walk_block(block, config, block.sizes(config), index)
    yield head_input(row, hidden)
    tied = row.embedding if config.tie_word_embeddings else row.head
    yield Site(row.head, "head", (vocabulary, hidden), None, row.head, reads=HEAD_INPUT, stored_as=tied)


def _walk_block(row: Architecture, config: Any, sizes: dict[str, int], index: int) -> Iterator[Site]:
    name = f"{row.blocks}.{index}"
    attention, heads = f"{name}.{row.attention}", (config.num_key_value_heads, row.head_dim(config))

    def width(wire: str) -> int:
        """What a norm makes, or one turns into the stream, is as wide as the stream."""
        return sizes.get(wire, sizes[STREAM])

    seen: set[str] = set()
    for part in row.linears():
        if part.reads == row.attended:
            for kind in ("keys", "values"):
                wire = getattr(row, kind)
                maker = row.maker(wire)
                rows = row.rows(wire, config) if isinstance(maker, Linear) and maker.parts else None
                span = rows and (rows.start, rows.stop)
                yield Site(
                    f"{name}.{kind}", kind, heads, index, attention, made_by=f"{name}.{maker.path}", rows=span,
                    window=window(config, index),
                )  # fmt: skip
        if part.reads not in seen:
            seen.add(part.reads)
            readers = tuple(f"{name}.{other.path}" for other in row.linears() if other.reads == part.reads)
            norm = row.norm_of(part.reads)
            beside = tuple(f"{name}.{other.path}" for other in row.routers() if other.reads == part.reads)
            yield Site(
                f"{name}.{part.reads}", "input", (width(part.reads),), index, "", readers=readers, beside=beside,
                norm=norm and f"{name}.{norm.path}",
            )  # fmt: skip
        path = f"{name}.{part.path}"
        before = f"{name}.{row.stream_norm_before(part).path}" if part.writes == STREAM else None
        count = getattr(config, part.experts) if part.experts else 0
        yield Site(
            path, "linear", (max(1, count) * width(part.writes), width(part.reads)), index, path,
            reads=f"{name}.{part.reads}", writes=part.writes, norm=before, stored_as=path, fused=part.parts,
            tensor=path if count else "", experts=count, transposed=part.transposed,
        )  # fmt: skip
