"""Grids as plain data, in recipes, plans and configurations: "int4", or {"points": [[...], ...]} of a user's own."""

from __future__ import annotations

import reprlib
from typing import TYPE_CHECKING, Annotated, Any

from paley.core import grids
from paley.core.errors import PaleyError, nearest_name
from paley.core.grids import AnyGrid, FixedGrid

__all__ = ["AnyGridField", "FixedGridField", "from_plain", "to_plain", "with_points", "without_points"]


def to_plain(grid: AnyGrid) -> str | dict[str, Any]:
    """Plain data from which `from_plain` makes an equal grid."""
    return {"points": grid.points.tolist()} if isinstance(grid, grids.Grid) and not grid.packaged else grid.name


def from_plain(value: object) -> AnyGrid:
    """A name, {"points": rows} or a grid -> the grid; PaleyError for anything else."""
    if isinstance(value, AnyGrid):
        return value
    if isinstance(value, str):
        return grids.load(value)
    if not isinstance(value, dict):
        raise PaleyError(f"must be a grid's name, or {{points: [[...], ...]}}, got {reprlib.repr(value)}")
    if extra := [key for key in value if key != "points"]:
        raise PaleyError(f"unknown key {extra[0]!r}{nearest_name(str(extra[0]), ['points'])}; known here: points")
    rows = value.get("points")
    if not isinstance(rows, list | tuple) or not all(isinstance(row, list | tuple) for row in rows):
        raise PaleyError("points: must be a list of lists of numbers")
    if wrong := [x for row in rows for x in row if type(x) not in (int, float)]:
        raise PaleyError(f"points: must be numbers, got {reprlib.repr(wrong[0])}")
    try:
        return grids.custom_of(tuple(tuple(map(float, row)) for row in rows))
    except OverflowError:
        raise PaleyError("points: must be numbers that float32 can hold") from None


def with_points(data: dict[str, Any], where: str) -> dict[str, Any]:
    """Undoes `without_points`; PaleyError if a name is not that of its points."""
    named = data.get("grids")
    if named is None:
        return data
    if not isinstance(named, dict):
        raise PaleyError(f"{where}: grids: must map names to points, got {reprlib.repr(named)}")
    for name, rows in named.items():
        try:
            actual = from_plain({"points": rows}).name
        except PaleyError as error:
            raise PaleyError(f"{where}: grids: grid {name!r}: {error}") from None
        if actual != name:
            raise PaleyError(f"{where}: grids: grid {name!r}: these points are {actual!r}; the file was changed")

    def resolved(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {key: resolved(child, key) for key, child in value.items()}
        if isinstance(value, list):
            return [resolved(child) for child in value]
        return {"points": named[value]} if key == "grid" and isinstance(value, str) and value in named else value

    try:
        return resolved({key: value for key, value in data.items() if key != "grids"})
    except RecursionError as error:
        raise PaleyError(f"{where}: is not plain JSON data ({error})") from None


def without_points(data: dict[str, Any]) -> dict[str, Any]:
    """Plain data whose schemes hold points -> names in their place, and a key `grids` with the points of each, once."""
    named: dict[str, Any] = {}

    def hoisted(value: Any, key: str = "") -> Any:
        if key == "grid" and isinstance(value, dict):
            name = from_plain(value).name
            named[name] = value["points"]
            return name
        if isinstance(value, dict):
            return {key: hoisted(child, key) for key, child in value.items()}
        return [hoisted(child) for child in value] if isinstance(value, list) else value

    found = hoisted(data)
    return found | {"grids": named} if named else found


class _Plain:
    """Makes pydantic read and write a field with these functions. Its schemas are plain dicts: no import."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> dict[str, Any]:
        written = {"type": "function-plain", "function": to_plain}
        return {
            "type": "function-plain",
            "function": {"type": "no-info", "function": from_plain},
            "serialization": written,
        }

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        rows = {"type": "array", "items": {"type": "array", "items": {"type": "number"}}}
        points = {"type": "object", "properties": {"points": rows}, "required": ["points"]}
        return {"anyOf": [{"type": "string"}, points]}


if TYPE_CHECKING:

    class AnyGridField:
        """A dataclass field that holds a grid. The constructor also takes the name of a packaged one."""

        def __get__(self, of: object, owner: Any) -> AnyGrid: ...

        def __set__(self, of: object, value: AnyGrid | str) -> None: ...

    class FixedGridField:
        """As AnyGridField, without free grids."""

        def __get__(self, of: object, owner: Any) -> FixedGrid: ...

        def __set__(self, of: object, value: FixedGrid | str) -> None: ...

else:
    AnyGridField = Annotated[AnyGrid, _Plain()]
    FixedGridField = Annotated[FixedGrid, _Plain()]
