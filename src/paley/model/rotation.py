"""Which rotations a model gets: folded into its weights (R1, R2), or at run time before each linear's input."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from paley.arch import Site, Sites
from paley.core import hadamard
from paley.core.errors import PaleyError, Setting
from paley.core.schemes import Rotation
from paley.core.transforms import Transform
from paley.model.adapter import Adapter
from paley.model.fold import fold_part_, parts, rotate_input_

__all__ = ["Turning", "decide_turning", "fold_", "input_blocks", "rotate_", "rotate_inputs_"]

_SMALLEST_BLOCK = 32  # smaller ones would cost more in scales and mix too few values to be Gaussian
_GRANULARITIES = (64, 32, 16, 8, 4)
Expansion = int | Literal["auto"]


@dataclass(frozen=True)
class Turning:
    """rotation: what is folded. inputs: transforms of inputs at run time by wire. block, outer_block: all other inputs
    of linears, and embedding and head, turn in Hadamard blocks of at most so many values; None: they do not.
    seed: draws the signs.
    """

    rotation: Rotation | None
    inputs: Mapping[str, Transform] = field(default_factory=dict)
    block: int | None = None
    outer_block: int | None = None
    seed: int = 0

    def of(self, site: Site, width: int) -> Transform | None:
        """The transform of what a linear or the head reads, `width` values; of an embedding's or tied head's rows."""
        if self.is_whole(site):
            return self.inputs[_wire(site)]
        block = self.block if site.kind == "linear" else self.outer_block
        return None if block is None else input_blocks(width, block, self.seed)

    def heads(self, keys: Site) -> Transform | None:
        """The transform of the keys of one attention."""
        if self.rotation is None:
            return None
        return self.rotation.heads or _in_blocks(keys.shape[1], self.seed + 1)

    def is_whole(self, site: Site) -> bool:
        """Whether the input turns as a part of the folded rotation, whatever is done to the weight that reads it."""
        whole = self.inputs.get(_wire(site))
        return whole is not None and whole.in_dim == site.shape[-1]  # layers without experts may be wider


def _wire(site: Site) -> str:
    return (site.reads or "").rpartition(".")[2]


def decide_turning(
    sites: Sites,
    mode: Literal["folded", "online", "none"],
    *,
    block: int,
    seed: int,
    expand: Expansion = 0,
    expand_mlp: Expansion = 0,
    rotate_output: bool = True,
    rounds: bool = True,
    bits: Sequence[float] = (),
) -> Turning:
    """The transforms for a model. mode `folded`: R1 and R2 are folded, the inputs of o and down turn at run time;
    `online`: every input turns at run time, in Hadamard blocks of at most `block` values.

    expand, expand_mlp: dimensions that the stream and down's input gain; auto: see `_auto_expansion`, which goes by
    the bits of weights and inputs. rounds: whether any weight or input is rounded: else nothing turns at run time.
    Errors: PaleyError for a family that forbids folding, and for widths that no Hadamard order reaches.
    """
    if mode == "none":
        return Turning(None)
    row, keys = sites.architecture, sites.of("keys")
    # Without a row, heads may differ from block to block, and each turns by itself.
    in_heads = None if row.walked else _in_blocks(keys[0].shape[1], seed + 1)
    if mode == "online":
        return Turning(Rotation(heads=in_heads), block=block, outer_block=block, seed=seed)
    if (why := row.why_stream_is_fixed()) is not None:
        raise PaleyError(f"rotate=folded: this family's residual stream cannot be rotated: {why}; set rotate=online")
    sizes = {wire: sites.of("input", block=0)[i].shape[0] for i, wire in enumerate(_wires(sites))}
    hidden, mlp, width = sites.embedding.shape[1], sizes[row.gated], sizes[row.attended]
    wide = hidden + (_auto_expansion(bits, hidden) if expand == "auto" else expand)
    _check_order("hidden size", wide, "expand")
    inputs: dict[str, Transform] = {}
    if rounds:
        wide_mlp = _reachable(mlp) if expand_mlp == "auto" else mlp + expand_mlp
        _check_order("MLP width", wide_mlp, "expand_mlp")
        inputs[row.gated] = Transform(mlp, wide_mlp, wide_mlp, seed + 2)
        if rotate_output:
            inputs[row.attended] = _in_blocks(width, seed + 3)
    # A tied pair stays in the coordinates of the checkpoint: R1 cannot go into one of the two alone.
    outer = block if sites.tied else None
    return Turning(Rotation(Transform(hidden, wide, wide, seed), in_heads), inputs, outer_block=outer, seed=seed)


def _wires(sites: Sites) -> list[str]:
    return [site.name.rpartition(".")[2] for site in sites.of("input", block=0)]


def rotate_(adapter: Adapter, rotation: Rotation | None, inputs: Mapping[str, Transform]) -> None:
    """Folds what is to be folded, and applies the weights' side of what turns at run time (`rotate_inputs_`)."""
    fold_(adapter, rotation)
    rotate_inputs_(adapter, adapter.sites.of("linear", "head"), inputs)


def fold_(adapter: Adapter, rotation: Rotation | None) -> None:
    """Folds the norms and applies R1 and R2, if the rotation has them. Without them the model stays as it is."""
    for part in parts(adapter):
        fold_part_(adapter, rotation, part)


def rotate_inputs_(adapter: Adapter, sites: Iterable[Site], inputs: Mapping[str, Transform]) -> None:
    """The weights' side of what turns at run time: of those sites, linears and the head, that `inputs` has by name."""
    for site in sites:
        if site.stored_as == site.name and site.name in inputs:
            rotate_input_(adapter.module(site.module), inputs[site.name])


def input_blocks(width: int, limit: int, seed: int) -> Transform:
    """The rotation of a linear's input in the largest Hadamard blocks up to `limit` that divide its width.

    A width that only tiny blocks divide is padded with zeros to the next multiple of a power of two.
    """
    fitting = (n for n in range(min(limit, width), 0, -1) if width % n == 0 and _exists(n))
    order, wide = next(fitting), width
    if order < min(_SMALLEST_BLOCK, limit):
        order = min(1 << (limit.bit_length() - 1), 1 << (width - 1).bit_length(), 128)
        wide = -(-width // order) * order
    return Transform(width, wide, order, seed)


def _auto_expansion(bits: Sequence[float], hidden: int) -> int:
    """Extra columns: the cheapest Hadamard order that still takes fewer bits than one more bit per value.

    Lemma 4.1 of arXiv:2504.13989 with b = b' + 1: (n + d) b' <= n (b' + 1). Widths are multiples of 64 where
    one fits, and among them the smallest dense factor wins, then the smallest width.
    """
    limit = hidden + int(hidden / max(bits)) if bits else hidden
    for step in _GRANULARITIES:
        widths = [n for n in range(hidden // step * step + step, limit + 1, step) if _exists(n)]
        if widths:
            return min(widths, key=lambda n: (hadamard.factor(n)[0], n)) - hidden
    raise PaleyError(
        f"expand=auto: no Hadamard order between hidden size {hidden} and the limit of {limit}",
        remedy=("give a number with ", Setting("expand")),
    )


def _exists(n: int) -> bool:
    try:
        hadamard.factor(n)
    except PaleyError:
        return False
    return True


def _in_blocks(width: int, seed: int) -> Transform:
    """The largest Hadamard order that divides `width`, which nothing can widen; 1 leaves it as it is."""
    order = max(n for n in range(1, width + 1) if width % n == 0 and _exists(n))
    return Transform(width, width, order, seed)


def _reachable(width: int) -> int:
    return width if _exists(width) else hadamard.nearest_orders(width)[1]


def _check_order(what: str, width: int, key: str) -> None:
    try:
        hadamard.factor(width)
    except PaleyError as error:
        raise PaleyError(f"{what} {width}: {error}; set {key} to a number that reaches one, or to auto") from None
