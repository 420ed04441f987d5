"""Grids for slots under a budget: measured slopes times the error of each grid, minimised exactly.

The linearity theorem (arXiv:2411.17525) makes the loss a sum over slots, alpha * t^2, and the choice a knapsack:
`core.allocation` solves it. Here slots become its items, and its answer the slots' schemes. t^2 of a weight is that of
Gaussian values, which rotation makes of it; of keys, values and inputs it is measured (`model.activation_errors`).
"""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from paley.core import grids, packing, tables
from paley.core.allocation import Allocation, Choice, allocate
from paley.core.errors import Call, PaleyError, Setting
from paley.core.rounding import codes_per_row, round_trip
from paley.core.schemes import ActivationScheme, AttentionSlot, LinearSlot, WeightScheme
from paley.format import spec
from paley.methods.nearest import gaussian_error
from paley.methods.sensitivity import MAX_T
from paley.model.activation_errors import Place
from paley.model.adapter import SHARED_INPUTS, Adapter, Block
from paley.model.rotation import decide_rotation
from paley.recipe import Budget, Recipe
from paley.sensitivity import Sensitivity

__all__ = [
    "Errors", "Slots", "activation_schemes", "check_budget", "decide_grids", "range_note", "weight_candidates",
]  # fmt: skip

# (place, scheme, width) -> t^2 of the scheme there, on vectors of so many values
Errors = Callable[[Place, ActivationScheme, int], float]

KEEP = "keep"
_SAMPLES = 2**17
_FEW_BITS = 3  # below, losses were measured to grow faster than the slopes say (docs/methods.md)
_TOTALS = {"size": "bits on disk", "read": "bits read a token"}  # limits in bytes, and what they limit
_AVERAGES = {"weights": ("weight",), "kv": ("keys", "values"), "inputs": ("input",)}  # limits in bits per value
_WAYS_OUT = {  # what a recipe may lack, and one that has it
    "weights": ("weights", "higgs-4", ""),
    "kv": ("keys or values", "higgs-w4a16kv4", ", or set keys and values"),
    "inputs": ("inputs", "higgs-w4a4", ", or set inputs"),
}


@dataclass(frozen=True)
class Slots:
    """What to do to each linear and each attention, by module name."""

    linears: dict[str, LinearSlot]
    attentions: dict[str, AttentionSlot]


@dataclass(frozen=True)
class _Item:
    """A slot that the budget decides: `places` (module, field) get the scheme that a choice stands for.

    slope: the name of the slot that its slope was measured of. options: what schemes of activations were chosen from.
    """

    name: str
    slope: str
    kind: str
    places: tuple[Place, ...]
    schemes: dict[str, WeightScheme | ActivationScheme | None]
    errors: dict[str, float]
    bits: dict[str, int]  # stored once for a weight, for each token otherwise
    options: tuple[ActivationScheme, ...] = ()


def decide_grids(
    recipe: Recipe, adapter: Adapter, slots: Slots, sensitivity: Sensitivity, errors: Errors | None = None
) -> tuple[Slots, Allocation]:
    """The slots with the grids of least predicted loss that the recipe's budget can pay for.

    adapter: the original model, or its skeleton. errors: measured ones of `activation_schemes`; those of Gaussian
    values unless given. Slots that an override of the recipe sets are left as they are, and paid for.
    Raises PaleyError for slopes that are missing or were measured otherwise, and for budgets out of reach.
    """
    budget = recipe.budget
    assert budget is not None
    items = _budgeted(recipe, adapter, slots, errors or _gaussian)
    _check_reach(recipe, adapter, slots, items)
    _check_slopes(recipe, adapter, items, sensitivity)
    amounts = _amounts(budget, recipe, adapter, slots, items)
    choices = {}
    for item in _within_linear_range(items, amounts, budget):
        slot = sensitivity.slots.get(item.slope)  # None for what no budget is about, and nobody measured
        choices[item.name] = [
            Choice(
                name,
                slot.loss(item.errors[name]) if slot is not None else 0.0,
                tuple(_costs(item.kind, bits, amounts, budget)),
            )
            for name, bits in item.bits.items()
        ]
    found = allocate(choices, list(amounts.values()), resources=list(amounts))
    return _with_choices(slots, items, found, recipe), found


def check_budget(recipe: Recipe, adapter: Adapter, slots: Slots, sensitivity: Sensitivity | None = None) -> None:
    """Raises as `decide_grids` would, before anybody measures slopes, or errors, for it."""
    items = _budgeted(recipe, adapter, slots, _unmeasured)
    _check_reach(recipe, adapter, slots, items)
    if sensitivity is not None:
        _check_slopes(recipe, adapter, items, sensitivity)


def activation_schemes(recipe: Recipe, adapter: Adapter, slots: Slots) -> dict[Place, tuple[ActivationScheme, ...]]:
    """Where the budget decides a grid of keys, values or inputs -> the schemes whose errors it is decided by."""
    items = _budgeted(recipe, adapter, slots, _unmeasured)
    return {item.places[0]: item.options for item in items if item.options}


def range_note(recipe: Recipe, adapter: Adapter, slots: Slots) -> str:
    """Why the loss may exceed what was predicted for weights decided so; empty where nothing speaks against it."""
    assert recipe.budget is not None
    if not _is_budgeted("weight", recipe.budget):
        return ""
    bits = values = beyond = 0
    for path, slot in slots.linears.items():
        linear: Any = adapter.model.get_submodule(path)
        out_features, in_features = linear.weight.shape
        bits += 8 * spec.linear_bytes(path, slot, in_features, out_features, _itemsize(recipe))
        values += out_features * in_features
        if slot.weight is not None:
            beyond += gaussian_error(slot.weight, slot.stored_width(in_features)) > MAX_T**2
    if bits < _FEW_BITS * values:
        return f"budget: below {_FEW_BITS} bits losses grow faster than predicted"
    if beyond:
        return (
            "budget: some weights are rounded beyond the range of the slopes, where losses grow faster than predicted"
        )
    return ""


def _budgeted(recipe: Recipe, adapter: Adapter, slots: Slots, errors: Errors) -> list[_Item]:
    budget = recipe.budget
    assert budget is not None
    _check_widths(recipe, adapter)
    return [item for item in _items(recipe, adapter, slots, errors) if _is_budgeted(item.kind, budget)]


def _within_linear_range(items: list[_Item], amounts: dict[str, int], budget: Budget) -> list[_Item]:
    """The items without choices whose t^2 is beyond the range of the slopes, as far as the budget can pay for that.

    Slopes say nothing of them: with such choices an optimum at 3 bits did worse than one grid for all.
    """
    thresholds = sorted({MAX_T**2, *(e for item in items for e in item.errors.values() if e > MAX_T**2)})
    for threshold in thresholds:
        left = [_up_to(item, threshold) for item in items]
        least = [
            sum(next(iter(_costs(item.kind, min(item.bits.values()), {name: 0}, budget))) for item in left)
            for name in amounts
        ]
        if all(cost <= amount for cost, amount in zip(least, amounts.values(), strict=True)):
            return left
    return items


def _up_to(item: _Item, threshold: float) -> _Item:
    """The item with its choices up to an error, or the one of least error."""
    limit = max(threshold, min(item.errors.values()))
    return replace(item, bits={name: bits for name, bits in item.bits.items() if item.errors[name] <= limit})


def _check_widths(recipe: Recipe, adapter: Adapter) -> None:
    """Raises where the recipe expands the model, whose weights here still have their own widths."""
    rotation = decide_rotation(recipe, adapter)
    if rotation is None:
        return
    for key, what, transform in (("expand", "hidden states", rotation.residual), ("expand_mlp", "MLPs", rotation.mlp)):
        if transform is not None and transform.out_dim != transform.in_dim:
            raise PaleyError(
                f"budget: {key}={getattr(recipe, key)} widens the {what} from {transform.in_dim} to "
                f"{transform.out_dim}, which no budget counts; set {key}=0 (and expand in the plan), or drop the budget"
            )


def _check_reach(recipe: Recipe, adapter: Adapter, slots: Slots, items: list[_Item]) -> None:
    """Raises where a limit is asked for that no choice meets, and says which there are."""
    budget = recipe.budget
    assert budget is not None
    for key, kinds in _AVERAGES.items():
        of_kind = [item for item in items if item.kind in kinds]
        if (limit := getattr(budget, key)) is None:
            continue
        if not of_kind:
            what, preset, other = _WAYS_OUT[key]
            raise PaleyError(
                Setting(f"budget.{key}"),
                f": this recipe quantizes no {what}",
                remedy=("take one that does, such as ", Setting("preset", preset), other),
            )
        values = sum(_values(adapter, item) for item in of_kind)
        low = sum(min(item.bits.values()) for item in of_kind) / values
        high = sum(max(item.bits.values()) for item in of_kind) / values
        if not low <= limit <= max(high, 16):
            raise PaleyError(
                Setting(f"budget.{key}"),
                f": {limit:g} bits are out of reach",
                remedy=f"{low:.4g} to {high:.4g} can be had here",
            )
    for key, beside in _BESIDE.items():
        if (limit := getattr(budget, key)) is None:
            continue
        low, high = (
            beside(recipe, adapter, slots, items)
            + sum(next(_costs(i.kind, end(i.bits.values()), {_TOTALS[key]: 0}, budget)) for i in items) / 8
            for end in (min, max)
        )
        if limit < low:
            raise PaleyError(
                Setting(f"budget.{key}"),
                f": {limit:,} bytes are out of reach",
                remedy=f"{low:,.0f} to {high:,.0f} can be had here",
            )


def _is_budgeted(kind: str, budget: Budget) -> bool:
    limits = {
        "weight": (budget.weights, budget.size, budget.read),
        "keys": (budget.kv, budget.read),
        "values": (budget.kv, budget.read),
        "input": (budget.inputs,),
    }
    return any(limit is not None for limit in limits[kind])


def _amounts(budget: Budget, recipe: Recipe, adapter: Adapter, slots: Slots, items: list[_Item]) -> dict[str, int]:
    """Resource -> how much of it there is, in bits."""
    found: dict[str, float] = {}
    for key, kinds in _AVERAGES.items():
        if (limit := getattr(budget, key)) is not None:
            found[f"bits of {key}"] = limit * sum(_values(adapter, item) for item in items if item.kind in kinds)
    for key, beside in _BESIDE.items():
        if (limit := getattr(budget, key)) is not None:
            found[_TOTALS[key]] = 8 * (limit - beside(recipe, adapter, slots, items))
    return {name: int(amount) for name, amount in found.items()}


def _costs(kind: str, bits: int, amounts: dict[str, int], budget: Budget) -> Iterator[int]:
    """What a choice of `bits` takes of each resource."""
    # A weight is read once for each token, and the cache as long as it is.
    reads = {"weight": 1, "keys": budget.context, "values": budget.context, "input": 0}
    counts = {_TOTALS["size"]: {"weight": 1}, _TOTALS["read"]: reads}
    counts |= {f"bits of {key}": dict.fromkeys(kinds, 1) for key, kinds in _AVERAGES.items()}
    for resource in amounts:
        yield counts[resource].get(kind, 0) * bits


def _items(recipe: Recipe, adapter: Adapter, slots: Slots, errors: Errors) -> Iterator[_Item]:
    for block in adapter.blocks:
        for role, path in block.linears():
            if slots.linears[path].weight is not None:
                yield _weight_item(recipe, block.part(role), path, slots.linears[path])
        for name, roles in SHARED_INPUTS:
            yield from _input_items(recipe, block, f"{block.name}.{name}_input", roles, slots, errors)
        path = block.path("attention")
        for kind in ("keys", "values"):
            if (scheme := getattr(slots.attentions[path], kind)) is not None:
                options = _options(recipe, path, kind, scheme)
                yield _activation_item(
                    f"{block.name}.{kind}", kind, ((path, kind),), options, adapter.head_dim, adapter.num_kv_heads,
                    errors,
                )  # fmt: skip


def _input_items(
    recipe: Recipe, block: Block, name: str, roles: tuple[str, ...], slots: Slots, errors: Errors
) -> Iterator[_Item]:
    """One item for the linears that read one tensor and round it alike; overrides may set members apart."""
    groups: dict[tuple[ActivationScheme, bool], list[str]] = {}
    for path in map(block.path, roles):
        if (scheme := slots.linears[path].input) is not None:
            groups.setdefault((scheme, _is_overridden(recipe, path, "input")), []).append(path)
    for n, ((scheme, _), paths) in enumerate(groups.items()):
        width = slots.linears[paths[0]].stored_width(block.part(roles[0]).in_features)
        places = tuple((path, "input") for path in paths)
        item = _activation_item(name, "input", places, _options(recipe, paths[0], "input", scheme), width, 1, errors)
        yield replace(item, name=f"{name}-{n}") if n else item


def _weight_item(recipe: Recipe, linear: Any, path: str, slot: LinearSlot) -> _Item:
    out_features, in_features = linear.weight.shape
    scheme = slot.weight
    assert scheme is not None
    schemes: dict[str, WeightScheme | ActivationScheme | None] = {}
    errors, bits = {}, {}
    names = [scheme.grid] if _is_overridden(recipe, path, "weight") else weight_candidates(recipe)
    for name in names:
        if name == KEEP:
            chosen, errors[name] = _kept(recipe, slot), 0.0
        else:
            chosen = replace(slot, weight=scheme.on_grid(name))
            errors[name] = gaussian_error(chosen.weight, slot.stored_width(in_features))
        schemes[name] = chosen.weight
        bits[name] = 8 * spec.linear_bytes(path, chosen, in_features, out_features, _itemsize(recipe))
    return _Item(path, path, "weight", ((path, "weight"),), schemes, errors, bits)


def _kept(recipe: Recipe, slot: LinearSlot) -> LinearSlot:
    """The slot with its weight unquantized, and without a rotation that has nothing left to serve."""
    needless = recipe.hadamard is not None and slot.input is None
    return replace(slot, weight=None, outliers=0, transform=None if needless else slot.transform)


def _activation_item(
    name: str,
    kind: str,
    places: tuple[Place, ...],
    options: list[ActivationScheme],
    width: int,
    rows: int,
    errors: Errors,
) -> _Item:
    """rows vectors of `width` values a token, a scale and a zero point for each group; of a grid the best scheme."""
    bits: dict[str, int] = {}
    best: dict[str, float] = {}
    schemes: dict[str, WeightScheme | ActivationScheme | None] = {}
    for scheme in options:
        grid = grids.load(scheme.grid)
        groups = width // (scheme.group_size or width)
        beside = groups * (16 + 8 * grid.affine)
        bits[grid.name] = rows * (8 * packing.packed_bytes(codes_per_row(width, grid.p), grid.size) + beside)
        error = errors(places[0], scheme, width)
        if grid.name not in best or error < best[grid.name]:
            best[grid.name], schemes[grid.name] = error, scheme
    return _Item(name, name, kind, places, schemes, best, bits, tuple(options))


def _options(recipe: Recipe, path: str, kind: str, scheme: ActivationScheme) -> list[ActivationScheme]:
    """The scheme with every grid of its grid's family, or itself where an override set it.

    Of keys and values also unclipped: what few bits gain by clipping, many lose.
    """
    if _is_overridden(recipe, path, kind):
        return [scheme]
    ratios = dict.fromkeys((scheme.clip_ratio, *((1.0,) if kind != "input" else ())))
    return [replace(scheme, grid=name, clip_ratio=ratio) for name in grids.family(scheme.grid) for ratio in ratios]


def weight_candidates(recipe: Recipe) -> list[str]:
    """Names of the grids that a weight may get, and 'keep'."""
    budget, scheme = recipe.budget, recipe.weights
    if budget is not None and budget.grids is not None:
        return list(budget.grids)
    assert scheme is not None
    family = grids.family(scheme.grid)
    if scheme.method == "nearest" and set(family) & set(tables.names()):
        # Gaussian grids of all dimensions: each meets rates that the others have not, and p = 1 alone has 8 bits.
        family = [*(name for name in family if name not in tables.names()), *tables.names()]
    return [*family, KEEP]


def _with_choices(slots: Slots, items: list[_Item], found: Allocation, recipe: Recipe) -> Slots:
    linears, attentions = dict(slots.linears), dict(slots.attentions)
    for item in items:
        scheme: Any = item.schemes[found.choices[item.name].name]
        for module, place in item.places:
            if module in attentions:
                attentions[module] = replace(attentions[module], **{place: scheme})
                continue
            slot = linears[module]
            linears[module] = _kept(recipe, slot) if scheme is None else replace(slot, **{place: scheme})
    return Slots(linears, attentions)


def _is_overridden(recipe: Recipe, path: str, field: str) -> bool:
    return any(fnmatch.fnmatchcase(path, o.pattern) and field in o.model_fields_set for o in recipe.overrides)


def _check_slopes(recipe: Recipe, adapter: Adapter, items: list[_Item], sensitivity: Sensitivity) -> None:
    if sensitivity.folded != recipe.rotate:
        have, need = ("with", "without") if sensitivity.folded else ("without", "with")
        again = Call("measure_sensitivity", (Setting("fold", recipe.rotate),))
        raise PaleyError(
            f"the sensitivities were measured {have} the norms' gains in the weights, but this recipe quantizes "
            f"weights {need} them",
            remedy=("measure them again with ", again),
        )
    sensitivity.check_slots({item.slope: (item.kind, _values(adapter, item)) for item in items if len(item.bits) > 1})


def _unmeasured(place: Place, scheme: ActivationScheme, width: int) -> float:
    return 0.0


def _gaussian(place: Place, scheme: ActivationScheme, width: int) -> float:
    return _gaussian_error(scheme, width)


@functools.lru_cache(maxsize=256)
def _gaussian_error(scheme: ActivationScheme, width: int) -> float:
    x = torch.randn(-(-_SAMPLES // width), width, generator=torch.Generator().manual_seed(0))
    return float((round_trip(x, scheme) - x).square().mean() / x.square().mean())


def _values(adapter: Adapter, item: _Item) -> int:
    """Entries of a weight; values that a token has of the other kinds."""
    module: Any = adapter.model.get_submodule(item.places[0][0])
    if item.kind == "weight":
        return module.weight.numel()
    if item.kind == "input":
        return module.in_features
    return adapter.num_kv_heads * adapter.head_dim


def _other_bytes(recipe: Recipe, adapter: Adapter, slots: Slots, items: list[_Item]) -> int:
    """Bytes on disk of everything but the weights that the budget decides."""
    skipped = {f"{name}.weight" for item in items if item.kind == "weight" for name, _ in item.places}
    values = sum(p.numel() for name, p in adapter.model.named_parameters() if name not in skipped)
    if recipe.rotate and adapter.model.config.tie_word_embeddings:
        values += adapter.part("embedding").weight.numel()  # untied
    means = sum(slot.center_keys and slot.keys is not None for slot in slots.attentions.values())
    return values * _itemsize(recipe) + means * 2 * adapter.num_kv_heads * adapter.head_dim


def _other_reads(recipe: Recipe, adapter: Adapter, slots: Slots, items: list[_Item]) -> int:
    """Bytes read for every token beside the items: lm_head, kept weights, a cache of 16 bits a value.

    Of the embedding that is a row, of the norms next to nothing.
    """
    decided = {name for item in items if item.kind == "weight" for name, _ in item.places}
    kept = sum(
        block.part(role).weight.numel()
        for block in adapter.blocks
        for role, path in block.linears()
        if path not in decided
    )
    sides = sum((slot.keys is None) + (slot.values is None) for slot in slots.attentions.values())
    assert recipe.budget is not None
    cache = 2 * recipe.budget.context * sides * adapter.num_kv_heads * adapter.head_dim
    return (adapter.part("head").weight.numel() + kept) * _itemsize(recipe) + cache


def _itemsize(recipe: Recipe) -> int:
    return 4 if recipe.dtype == "float32" else 2


# Bytes that each of `_TOTALS` counts beside the items.
_BESIDE = {"size": _other_bytes, "read": _other_reads}
