"""What each linear and each attention of a model gets, and whether that fits them; nothing is measured here."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from paley.core.errors import PaleyError, nearest_name
from paley.core.rounding import check_groups
from paley.core.schemes import AttentionSlot, LinearSlot
from paley.core.transforms import Transform
from paley.format import spec
from paley.model.adapter import RESIDUAL_WRITERS, Adapter
from paley.model.budget import Slots, check_budget
from paley.model.loading import Source
from paley.model.rotation import decide_rotation, input_blocks
from paley.pipeline.texts import calibrates
from paley.plan import Plan, Rotation
from paley.recipe import Recipe

__all__ = ["check_plan", "check_settings", "fitted_groups", "linear_shapes", "slots_for"]

# The ways out of a group_size that divides no layer's width, beside a divisor.
_FITTED = " (weights.group_size, inputs.group_size), or fit_groups=true"
_OVERRIDDEN = " in the override that gave it, which fit_groups leaves as it is"


def slots_for(
    recipe: Recipe, adapter: Adapter, rotation: Rotation | None
) -> tuple[dict[str, LinearSlot], dict[str, AttentionSlot]]:
    """What the recipe asks of each linear and each attention of the model."""
    rotation = rotation or Rotation()
    linears, attentions, shapes = {}, {}, linear_shapes(adapter, rotation)
    for block in adapter.blocks:
        for role, path in block.linears():
            online = {"o": rotation.output, "down": rotation.mlp}.get(role)
            linears[path] = _linear_slot(recipe, path, online, shapes[path][1])
        path = block.path("attention")
        attentions[path] = recipe.attention_slot(path, rotation.head)
    recipe.check_overrides(linears, attentions)
    return linears, attentions


def _linear_slot(recipe: Recipe, path: str, online: Transform | None, in_features: int) -> LinearSlot:
    """What the recipe asks of a linear whose input `online` turns; or Hadamard blocks do, where the recipe has them.

    A row has a scale for each block unless the recipe says otherwise.
    """
    slot, blocks = recipe.linear_slot(path, online), None
    if recipe.hadamard is not None and slot.weight is not None:
        blocks = input_blocks(in_features, recipe.hadamard, recipe.seed)
        slot = replace(slot, transform=blocks)
    slot = recipe.linear_slot(path, slot.transform, slot.stored_width(in_features))
    if blocks is not None and slot.weight is not None and slot.weight.group_size is None:
        slot = replace(slot, weight=replace(slot.weight, group_size=blocks.order))
    return slot


def fitted_groups(recipe: Recipe, adapter: Adapter, rotation: Rotation | None) -> str:
    """'groups of 160 in 24 layers and 112 in 4, whose width 128 does not divide'; empty where none had to be fitted."""
    asked, _ = slots_for(recipe.model_copy(update={"fit_groups": False}), adapter, rotation)
    made, _ = slots_for(recipe, adapter, rotation)
    found: dict[int | None, Counter[int | None]] = {}
    for path, slot in made.items():
        pairs = ((asked[path].weight, slot.weight), (asked[path].input, slot.input))
        sizes = {(before.group_size, after.group_size) for before, after in pairs if before and after}
        for before, after in sizes:
            if before != after:
                found.setdefault(before, Counter())[after] += 1
    return "; ".join(f"{_groups(sizes)}, whose width {before} does not divide" for before, sizes in found.items())


def _groups(sizes: Counter[int | None]) -> str:
    (size, count), *others = sizes.most_common()
    parts = [f"groups of {size} in {count} layer{'s' if count > 1 else ''}", *(f"{s} in {n}" for s, n in others)]
    return f"{', '.join(parts[:-1])} and {parts[-1]}" if others else parts[0]


def linear_shapes(adapter: Adapter, rotation: Rotation | None) -> dict[str, tuple[int, int]]:
    """Linear -> its (out_features, in_features) in the residual stream as `rotation` widens it."""
    residual = rotation.residual if rotation is not None else None
    found = {}
    for block in adapter.blocks:
        for role, path in block.linears():
            out_features, in_features = block.part(role).weight.shape
            if residual is not None and role in RESIDUAL_WRITERS:
                out_features = residual.out_dim
            elif residual is not None:
                in_features = residual.out_dim
            found[path] = (out_features, in_features)
    return found


def check_settings(source: Source, recipe: Recipe, plan: Plan | None = None) -> None:
    """Raises where `decide` or `execute` would, for settings that do not fit the model; nothing is measured.

    Groups that do not divide a layer's width, more outliers than columns, budgets that no choice of grids meets, and
    plans that were edited to need a text that their recipe does not gather.
    """
    adapter = Adapter(source.skeleton())
    rotation = decide_rotation(recipe, adapter) if plan is None else plan.rotation
    if plan is None:
        linears, attentions = slots_for(recipe, adapter, rotation)
        way_out = _OVERRIDDEN if recipe.fit_groups else _FITTED
    else:
        check_plan(plan, adapter)
        linears, attentions, way_out = plan.linears, plan.attentions, ""
    if not calibrates(recipe):
        wanting = [path for path, slot in linears.items() if slot.needs_data]
        wanting += [path for path, slot in attentions.items() if slot.keys is not None and slot.center_keys]
        if wanting:
            raise PaleyError(
                f"plan: {wanting[0]} needs calibration text, which nothing in the plan's own recipe asks for; change "
                "that recipe too (weights.method=gptq), or leave out gptq, outliers and center_keys"
            )
    for path, (out_features, in_features) in linear_shapes(adapter, rotation).items():
        slot = linears[path]
        width = slot.stored_width(in_features)
        if slot.weight is not None:
            check_groups(width, slot.weight.group_size, path, what="in_features=", way_out=way_out)
        spec.expected_tensors(path, slot, width, out_features)
        if slot.input is not None:
            check_groups(width, slot.input.group_size, f"{path}: input", way_out=way_out)
    for path, slot in attentions.items():
        for what, scheme in (("keys", slot.keys), ("values", slot.values)):
            if scheme is not None:
                check_groups(adapter.head_dim, scheme.group_size, f"{path}: {what}")
    if plan is None and recipe.budget is not None:
        check_budget(recipe, adapter, Slots(linears, attentions))


def check_plan(plan: Plan, adapter: Adapter) -> None:
    """Raises where an edited plan no longer fits the model, or its slots no longer fit its rotation."""
    linears, attentions = slots_for(plan.recipe, adapter, plan.rotation)
    for wanted, given in ((linears, plan.linears), (attentions, plan.attentions)):
        for name in {*wanted, *given}:
            if name not in given:
                raise PaleyError(f"plan: {name} has no slot; write one, with nulls to leave it unquantized")
            if name not in wanted:
                raise PaleyError(f"plan: {name} is no layer of this model{nearest_name(name, wanted)}")
            kept = plan.recipe.hadamard is not None and given[name] == LinearSlot()
            if given[name].transform != wanted[name].transform and not kept:
                raise PaleyError(
                    f"plan: {name} has transform {given[name].transform}, but the plan's rotation makes it "
                    f"{wanted[name].transform}; the two must agree"
                )
