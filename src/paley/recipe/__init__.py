"""Recipes: how to quantize a model, as a person writes it. They come from presets, files and settings."""

from paley.recipe.loading import apply_settings, load_recipe
from paley.recipe.models import Budget, Calibration, Override, Recipe, Search, Test, Tune
from paley.recipe.presets import as_recipe, examples, preset, preset_methods, under_budget

__all__ = [
    "Budget",
    "Calibration",
    "Override",
    "Recipe",
    "Search",
    "Test",
    "Tune",
    "apply_settings",
    "as_recipe",
    "examples",
    "load_recipe",
    "preset",
    "preset_methods",
    "under_budget",
]
