"""Defaults that the library and the command line share; torch is not imported for them."""

from __future__ import annotations

__all__ = ["LEVELS", "SELF"]

LEVELS = 15  # noise levels of a slot, at most
SELF = "self"  # the source of text that the model writes itself
