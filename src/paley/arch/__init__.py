"""Model families as data: one row a family, and every place of a model where a tensor can be quantized.

Nothing here imports torch or transformers. A module's path, a wire's name or a family's name occurs nowhere else.
"""

from paley.arch.families import FAMILIES, family
from paley.arch.older_keys import OLDER_ROPE_KEYS
from paley.arch.row import Architecture, Linear, Norm, Tap, rope_follows_length, window
from paley.arch.sites import Kind, Site, Sites, head_input, sites

__all__ = [
    "FAMILIES", "OLDER_ROPE_KEYS", "Architecture", "Kind", "Linear", "Norm", "Site", "Sites", "Tap", "family",
    "head_input", "rope_follows_length", "sites", "window",
]  # fmt: skip
