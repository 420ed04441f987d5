"""Paley quantizes Hugging Face causal language models: weights, activations and KV cache, to 4, 3 or 2 bits.

Importing it teaches transformers the format: AutoModelForCausalLM.from_pretrained then loads such folders.
"""

from __future__ import annotations

from pathlib import Path

from paley import hf, kernels, pipeline
from paley.core.errors import PaleyError
from paley.core.hadamard import hadamard
from paley.eval.perplexity import evaluate
from paley.export.plain import dequantize
from paley.hf import load
from paley.model.kv_cache import PackedKVCache, cache_argument
from paley.pipeline import Monitor, Outcome
from paley.pipeline.sensitivities import measure_sensitivity
from paley.plan import Plan
from paley.recipe import Recipe, load_recipe, preset
from paley.sensitivity import Sensitivity

__all__ = [
    "PackedKVCache",
    "PaleyError",
    "Plan",
    "Recipe",
    "Sensitivity",
    "__version__",
    "cache_argument",
    "dequantize",
    "evaluate",
    "hadamard",
    "load",
    "make_plan",
    "measure_sensitivity",
    "quantize",
]

__version__ = "0.1.0"

_RECIPE_FILES = (".yaml", ".yml", ".json")

hf.register()
kernels.register()


def quantize(
    model: str | Path,
    recipe: Recipe | str | Path | None = None,
    *,
    output: str | Path,
    plan: Plan | None = None,
    sensitivity: Sensitivity | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "cpu",
    workers: int = 1,
    monitor: Monitor | None = None,
) -> Outcome:
    """Quantizes the checkpoint folder or Hub name `model` into the new folder `output`.

    recipe: a Recipe, a preset's name such as "w4a4kv4", or a .yaml or .json file; or give a plan that was
    made for this model. sensitivity: what a recipe with a budget goes by; without it, it is measured. workers:
    processes that share the weights of a data-free recipe. A run that was stopped goes on with resume=True.
    Errors: PaleyError, and nothing in `output`.
    """
    return pipeline.quantize(
        model,
        None if recipe is None else _recipe(recipe),
        output=output,
        plan=plan,
        sensitivity=sensitivity,
        resume=resume,
        overwrite=overwrite,
        device=device,
        workers=workers,
        monitor=monitor,
    )


def make_plan(
    model: str | Path,
    recipe: Recipe | str | Path,
    *,
    sensitivity: Sensitivity | None = None,
    device: str = "cpu",
    monitor: Monitor | None = None,
) -> Plan:
    """Decides only: the plan that `quantize` with this recipe (as there) would execute."""
    return pipeline.make_plan(model, _recipe(recipe), sensitivity=sensitivity, device=device, monitor=monitor)


def _recipe(recipe: Recipe | str | Path) -> Recipe:
    """A file by its suffix, any other text as a preset's name."""
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Path) or recipe.lower().endswith(_RECIPE_FILES):
        return load_recipe(recipe)
    return preset(recipe)
