"""W(1+1)A(1x4) beside other ways to two bits, and what its parts are worth: studies/results/binary-MODEL.json.

python -m studies.binary MODEL [--text FILE] [--only RE] [--calibration N] [--test N]
Inputs and KV cache have 4 bits in every row. Groups are the divisor of a layer's width nearest to 128; of each 32 input
columns one stays in int8 where a method keeps any. Bits are those stored for each weight of the quantized layers.
"""

from __future__ import annotations

from collections.abc import Iterator

from studies.experiment import BLOCKS_ALONE, Experiment

from paley.recipe import Recipe, apply_settings, preset

GROUP, SHARE = 128, 32


class Variants:
    """Recipes for a model whose residual stream has `hidden` values."""

    def __init__(self, hidden: int):
        self.hidden = hidden

    def grouped(self, base: str, *settings: str, group: int = GROUP, outliers: int = 0) -> Recipe:
        """base with groups in every layer's weights and inputs."""
        recipe = apply_settings(preset(base + BLOCKS_ALONE), [*settings, f"outliers={outliers}"])
        parts = [part for part in ("weights", "inputs") if getattr(recipe, part) is not None]
        return apply_settings(recipe, ["fit_groups=true", *(f"{part}.group_size={group}" for part in parts)])

    def rows(self) -> Iterator[tuple[str, Recipe]]:
        few, most = max(1, self.hidden // SHARE // 2), max(1, self.hidden // SHARE)
        integers = ("weights.grid=int2", "inputs.grid=uint4", "keys.grid=uint4", "values.grid=uint4")
        published = ("weights.sweeps=0", "compensate=plain")
        atom = ("weights.grid=int2", "weights.scale_search=mse", *published)
        yield "rtn", self.grouped("rtn-w2a4kv4", *integers)
        yield "gptq", self.grouped("quarot-w2a4kv4", "rotate=none", *integers)
        yield "atom-like", self.before(*atom, outliers=most)
        for bits in (2, 3):
            yield f"higgs w{bits}", preset(f"higgs-w{bits}a4kv4{BLOCKS_ALONE}")
            ours = preset(f"gbs-w{bits}a4kv4{BLOCKS_ALONE}")
            yield f"paley w{bits}a4kv4", apply_settings(ours, ["search.method=none"])
        yield "w1a4, before, gptq as published", self.before(*published, outliers=most)
        yield "w1a4, before", self.before(outliers=most)
        yield "hessian: none", self.before("weights.scale_search=em", outliers=most)
        yield "hessian: inverse", self.before("weights.scale_search=em_inverse", outliers=most)
        yield "two scales", self.before("weights.grid=mirror2", outliers=most)
        yield "no feedback", self.before("weights.method=nearest", outliers=most)
        yield "no sweeps", self.before("weights.sweeps=0", outliers=most)
        yield "plain target", self.before("compensate=plain", outliers=most)
        yield "no int8 columns", self.before()
        yield f"int8 columns 1/{2 * SHARE}", self.before(outliers=few)
        yield "refitted inputs", self.before("inputs.refit=true", outliers=most)
        yield "mean keys", self.before("center_keys=true", outliers=most)
        yield "rotated", self.before("rotate=auto", outliers=most)
        yield "rotated, no int8 columns", self.before("rotate=auto")
        for group in (64, 256):
            yield f"groups of {group}", self.before(group=group, outliers=most)
        flat = "diagonal=false"
        yield "w1a4", self.grouped("w1a4", flat)
        yield "w1a4, two scales", self.grouped("w1a4", flat, "weights.grid=mirror2")
        yield "w1a4, hessian: none", self.grouped("w1a4", flat, "weights.scale_search=em")
        yield "w1a4, refitted inputs", self.grouped("w1a4", flat, "inputs.refit=true")
        yield "w1a4, diagonal", self.grouped("w1a4")
        yield "w1a16", self.grouped("w1a16", flat)

    def before(self, *settings: str, group: int = GROUP, outliers: int = 0) -> Recipe:
        """W(1+1)A(1x4) as we first reconstructed it: no rotation, outlier columns instead."""
        flat = ("rotate=none", "diagonal=false", "center_keys=false")
        return self.grouped("w1a4", *flat, *settings, group=group, outliers=outliers)


def main() -> None:
    experiment = Experiment("binary", Experiment.parser(__doc__, calibration=128, search=8, test=96).parse_args())
    for name, recipe in Variants(experiment.source.sites.embedding.shape[1]).rows():
        experiment.row(name, lambda recipe=recipe: experiment.quantize(recipe).row)


if __name__ == "__main__":
    main()
