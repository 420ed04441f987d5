"""The stages of a run: decide a plan, execute it, save, verify, evaluate; killed at any point, it resumes.

A run needs transformers, whose import takes seconds; what only reads a folder does not, so names come when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from paley.pipeline.monitor import Monitor

if TYPE_CHECKING:
    from paley.pipeline.run import Outcome, make_plan, quantize

__all__ = ["Monitor", "Outcome", "make_plan", "quantize"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'paley.pipeline' has no attribute {name!r}")
    return getattr(import_module("paley.pipeline.run"), name)
