"""Recipes: what to do to a model, as a person writes it; presets, files and settings that make one."""

from paley.recipe.loading import apply_settings, load_recipe
from paley.recipe.models import Budget, Calibration, Override, Recipe, Search, Test
from paley.recipe.presets import as_recipe, examples, preset, preset_methods, under_budget

__all__ = [
    "Budget",
    "Calibration",
    "Override",
    "Recipe",
    "Search",
    "Test",
    "apply_settings",
    "as_recipe",
    "examples",
    "load_recipe",
    "preset",
    "preset_methods",
    "under_budget",
]
