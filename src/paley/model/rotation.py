"""Which rotations a recipe asks of a model (R1 to R4 and expansion), and their application to its weights."""

from __future__ import annotations

from paley.core import grids, hadamard
from paley.core.errors import PaleyError, Setting
from paley.core.transforms import Transform
from paley.model import fold
from paley.model.adapter import Adapter
from paley.plan import Rotation
from paley.recipe import Recipe

__all__ = ["decide_rotation", "input_blocks", "rotate_"]

_SMALLEST_BLOCK = 32  # smaller ones would cost more in scales and mix too few values to be Gaussian
_GRANULARITIES = (64, 32, 16, 8, 4)


def decide_rotation(recipe: Recipe, adapter: Adapter) -> Rotation | None:
    """The transforms for this model; None where the recipe does not rotate. Errors name the way out."""
    if not recipe.rotate:
        return None
    hidden, seed = adapter.hidden_size, recipe.seed
    wide = hidden + (_auto_expansion(recipe, hidden) if recipe.expand == "auto" else recipe.expand)
    _check_order("hidden size", wide, "expand")
    mlp = adapter.intermediate_size
    # What rotates at run time only serves rounding: where none is asked for, the model stays an ordinary one.
    overridden = any(o.weight or o.input for o in recipe.overrides)
    online = recipe.weights is not None or recipe.inputs is not None or overridden
    wide_mlp = _reachable(mlp) if recipe.expand_mlp == "auto" else mlp + recipe.expand_mlp
    if online:
        _check_order("MLP width", wide_mlp, "expand_mlp")
    width = adapter.num_heads * adapter.head_dim
    return Rotation(
        residual=Transform(hidden, wide, wide, seed),
        head=_in_blocks(adapter.head_dim, seed + 1),
        output=_in_blocks(width, seed + 3) if online and recipe.rotate_output else None,
        mlp=Transform(mlp, wide_mlp, wide_mlp, seed + 2) if online else None,
    )


def rotate_(adapter: Adapter, rotation: Rotation | None) -> None:
    """Unties, folds the norms and applies R1, R2 and the weights' side of what rotates at run time.

    Without a rotation the model stays as it is.
    """
    if rotation is None:
        return
    fold.untie_(adapter)
    fold.fold_norms_(adapter)
    if rotation.residual is not None:
        fold.rotate_residual_(adapter, rotation.residual)
    for block in adapter.blocks:
        if rotation.head is not None:
            fold.rotate_values_(block, rotation.head)
        for role, transform in (("o", rotation.output), ("down", rotation.mlp)):
            if transform is not None:
                fold.rotate_input_(block.part(role), transform)


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


def _auto_expansion(recipe: Recipe, hidden: int) -> int:
    """Extra columns: the cheapest Hadamard order that still takes fewer bits than one more bit per value.

    Lemma 4.1 of arXiv:2504.13989 with b = b' + 1: (n + d) b' <= n (b' + 1). Widths are multiples of 64 where
    one fits, and among them the smallest dense factor wins, then the smallest width.
    """
    bits = [grids.load(s.grid).bits for s in (recipe.weights, recipe.inputs) if s is not None]
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
