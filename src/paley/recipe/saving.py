"""Plain data -> JSON that a person can read and diff."""

from __future__ import annotations

import json
import re
from typing import Any, TypeVar

__all__ = ["in_natural_order", "json_lines"]

T = TypeVar("T")


def in_natural_order(named: dict[str, T]) -> dict[str, T]:
    """layers.2 before layers.10."""
    return {name: named[name] for name in sorted(named, key=_natural_key)}


def _natural_key(name: str) -> list[tuple[int, str]]:
    return [(int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", name)]


def json_lines(value: Any, levels: int, indent: str = "") -> str:
    """JSON with one entry a line in the outer `levels` of containers; each inner container is on one line."""
    if levels == 0 or not isinstance(value, dict | list) or not value:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    inner = indent + " "
    if isinstance(value, list):
        entries = [inner + json_lines(item, levels - 1, inner) for item in value]
        return "[\n" + ",\n".join(entries) + f"\n{indent}]"
    entries = [
        f"{inner}{json.dumps(key, ensure_ascii=False)}: {json_lines(item, levels - 1, inner)}"
        for key, item in value.items()
    ]
    return "{\n" + ",\n".join(entries) + f"\n{indent}}}"
