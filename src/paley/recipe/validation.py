"""Plain data from a file -> a pydantic model, or a PaleyError that names file, key, value and type."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from paley.core.errors import PaleyError, nearest_name

__all__ = ["key_path", "known_keys", "problems", "validate"]

M = TypeVar("M", bound=BaseModel)
Loc = Sequence[str | int]
MISSING = ("missing", "missing_argument")
TYPES = {
    "bool": "boolean",
    "dict": "mapping",
    "list": "list",
    "str": "text",
    "NoneType": "null",
    "float": "number",
    "int": "integer",
}


def validate(model: type[M], data: object, where: str) -> M:
    """data (dicts, lists, strings, numbers) -> the model. Strict: '8' is not an integer, and 1 is not a boolean."""
    if not isinstance(data, dict):
        raise PaleyError(f"{where}: expected a mapping of keys to values, got {_type(data)}")
    try:
        text = json.dumps(data)
    except (TypeError, ValueError) as error:
        raise PaleyError(f"{where}: holds a value that is not plain data ({error}); put text in quotes") from None
    try:
        return model.model_validate_json(text, strict=True)
    except ValidationError as error:
        wrong = problems(error, data, model)
        text = "; ".join(f"{path}: {problem}".removeprefix(": ") for path, problem in wrong.items())
        raise PaleyError(f"{where}: {text}") from None


def problems(error: ValidationError, data: object, model: type[BaseModel]) -> dict[str, str]:
    """Key -> the problem with its value, one sentence, also if it fits no member of a union."""
    reasons: dict[str, list[str]] = {}
    got: dict[str, str] = {}
    for detail in error.errors(include_url=False):
        loc = _loc_in(data, detail)
        path = key_path(loc)
        reasons.setdefault(path, []).append(_reason(detail, loc, model))
        if detail["type"] not in ("value_error", *MISSING):
            got[path] = f" (got {_shown(detail['input'])}, {_type(detail['input'])})"
    return {path: f"{' or '.join(why)}{got.get(path, '')}" for path, why in reasons.items()}


def _reason(detail: ErrorDetails, loc: Loc, model: type[BaseModel]) -> str:
    if detail["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = known_keys(model, loc[:-1])
        return f"unknown key{nearest_name(str(loc[-1]), known)}; known here: {', '.join(known)}"
    if detail["type"] in MISSING:
        return "is required and missing"
    return detail["msg"].removeprefix("Value error, ").removeprefix("Input ")


def _loc_in(data: object, detail: ErrorDetails) -> list[str | int]:
    """The part of the error's location that exists in the data; pydantic adds the names of union members."""
    loc: list[str | int] = []
    for part in detail["loc"]:
        entries: Any = dict(enumerate(data)) if isinstance(data, list) else data
        if not isinstance(entries, dict) or part not in entries:
            return [*loc, part] if detail["type"] in MISSING else loc
        data = entries[part]
        loc.append(part)
    return loc


def key_path(loc: Loc) -> str:
    """('linears', 'model.layers.0', 'input', 0) -> linears['model.layers.0'].input[0]"""
    path = ""
    for part in loc:
        plain = isinstance(part, str) and part.isidentifier()
        path += f".{part}" if plain else f"[{part!r}]"
    return path.removeprefix(".")


def known_keys(model: type[BaseModel], loc: Loc) -> list[str]:
    """The keys that the model accepts at `loc`; empty if it accepts any key, or none."""
    root = model.model_json_schema()
    nodes = _branches(root, root)
    for part in loc:
        below = []
        for node in nodes:
            key = "items" if isinstance(part, int) else "additionalProperties"
            child = node.get("properties", {}).get(part, node.get(key))
            if isinstance(child, dict):
                below += _branches(child, root)
        nodes = below
    return [name for node in nodes for name in node.get("properties", {})]


def _branches(node: dict[str, Any], root: dict[str, Any]) -> list[dict[str, Any]]:
    """A JSON schema's node -> the nodes that it may be: references are followed, unions are split."""
    if "$ref" in node:
        return _branches(root["$defs"][node["$ref"].rpartition("/")[2]], root)
    members = node.get("anyOf", []) + node.get("allOf", [])
    return [branch for member in members for branch in _branches(member, root)] or [node]


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."


def _type(value: object) -> str:
    name = type(value).__name__
    return TYPES.get(name, name)
