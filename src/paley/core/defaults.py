"""Defaults that the library and the command line share; torch is not imported for them."""

from __future__ import annotations

__all__ = ["LEVELS", "SELF"]

LEVELS = 15  # noise levels of a site, at most
SELF = "self"  # the source: text that the model samples from itself
