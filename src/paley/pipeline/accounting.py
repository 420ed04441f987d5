"""What is stored, to the byte: nothing left unquantized goes unmentioned."""

from __future__ import annotations

from math import prod

from paley.format import spec
from paley.format.checkpoint import Checkpoint
from paley.model.adapter import Adapter
from paley.model.loading import Source
from paley.pipeline.slots import linear_shapes
from paley.pipeline.stages import storage_dtype
from paley.plan import Plan

__all__ = ["parameter_count", "quantized_bits", "untouched"]


def parameter_count(source: Source) -> int:
    """Values stored in the original checkpoint; a tied weight counts once, however often it is stored."""
    return sum(prod(source.checkpoint.shape(name)) for name in source.checkpoint.names)


def quantized_bits(plan: Plan, source: Source) -> float | None:
    """Stored bits for each original weight of the linears that the recipe quantizes; None where it quantizes none.

    Codes, scales, zeros and expansion count, and at its full width what the budget chose to keep; what an override
    keeps does not.
    """
    itemsize = storage_dtype(plan.recipe, source).itemsize
    adapter = Adapter(source.skeleton())
    own, stored, weights = linear_shapes(adapter, None), 0, 0
    for path, (out_features, in_features) in linear_shapes(adapter, plan.rotation).items():
        slot = plan.linears[path]
        if slot.weight is None and plan.recipe.linear_slot(path).weight is None:
            continue
        weights += own[path][0] * own[path][1]
        stored += spec.linear_bytes(path, slot, in_features, out_features, itemsize)
    return 8 * stored / weights if weights else None


def untouched(checkpoint: Checkpoint, plan: Plan) -> dict[str, int]:
    """Name -> number of values, of every tensor left unquantized; vectors and mean keys as one entry each."""
    quantized = {name for name, slot in plan.linears.items() if slot.weight is not None}
    found: dict[str, int] = {}
    for name, info in checkpoint.infos.items():
        layer, _, part = name.rpartition(".")
        if layer in quantized and part != "bias":
            continue
        entry = "mean keys" if part == "key_mean" else name if len(info.shape) > 1 else "norms and biases"
        found[entry] = found.get(entry, 0) + prod(info.shape)
    return found
