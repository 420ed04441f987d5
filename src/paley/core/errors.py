"""What a user did wrong, said so that it can be put right: where, what, got, way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PaleyError(ValueError):
    """Bad input or a bad file. The command line prints the message and exits with 2.

    A ValueError, so that pydantic knows it as an answer to data and adds at which key.
    """


def nearest_name(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known name closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
