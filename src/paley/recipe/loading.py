"""Reads recipes from YAML or JSON files, and applies settings to them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from paley.core.errors import PaleyError, nearest_name
from paley.core.reading import read_json, read_text
from paley.recipe.models import Recipe
from paley.recipe.validation import key_path, known_keys, validate

__all__ = ["apply_settings", "load_recipe", "setting_text", "yaml_value"]


class _UniqueKeys(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice; PyYAML would silently take the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = []
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.append(key)
        return super().construct_mapping(node, deep)


def yaml_value(text: str, where: str) -> Any:
    """The plain data that a YAML text holds."""
    try:
        return yaml.load(text, _UniqueKeys)  # a SafeLoader
    except (yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise PaleyError(f"{where}: is not valid YAML ({reason})") from None


def load_recipe(path: str | Path) -> Recipe:
    """A .yaml, .yml or .json file -> the recipe; errors name the file, the key, the value and its type."""
    path = Path(path)
    if path.suffix == ".json":
        data = read_json(path, "recipe")
    else:
        data = yaml_value(read_text(path, "recipe"), str(path))
    return validate(Recipe, data, str(path))


def apply_settings(recipe: Recipe, settings: Iterable[str | tuple[str, Any]]) -> Recipe:
    """recipe with these settings: pairs such as ("search.sequences", 8), or texts such as 'inputs.clip_ratio=0.85'.

    A text's value is YAML. All settings are applied before the result is checked, so that their order matters only if
    one contains another. A group_size of weights or inputs sets fit_groups to false, so that it is used or refused;
    a setting of fit_groups itself takes precedence.
    """
    data = recipe.model_dump(mode="json")
    by_hand: dict[str, Any] = {}
    texts: list[str] = []
    for setting in settings:
        texts.append(setting_text(setting))
        where = f"setting {texts[-1]!r}"
        key, value = _parsed(setting, where) if isinstance(setting, str) else setting
        by_hand[key] = value
        _put(data, key.split("."), value, where)
    if "fit_groups" not in by_hand and any(_gives_groups(key, value) for key, value in by_hand.items()):
        data["fit_groups"] = False
    return validate(Recipe, data, f"settings {' '.join(texts)}") if texts else recipe


def setting_text(setting: str | tuple[str, Any]) -> str:
    """The setting as text for messages: 'seed=3', 'test=null'."""
    if isinstance(setting, str):
        return setting
    key, value = setting
    return f"{key}={'null' if value is None else value}"


def _parsed(setting: str, where: str) -> tuple[str, Any]:
    """'KEY=VALUE' -> key, and the value read as YAML."""
    key, equals, text = setting.partition("=")
    if not key.strip() or not equals:
        raise PaleyError(f"{where}: expected KEY=VALUE, for example search.sequences=8")
    return key.strip(), yaml_value(text, where)


def _gives_groups(key: str, value: Any) -> bool:
    """Whether a setting gives a group_size of weights or inputs."""
    part, _, field = key.partition(".")
    size = value if field == "group_size" else value.get("group_size") if isinstance(value, dict) else None
    return part in ("weights", "inputs") and size is not None


def _put(data: dict[str, Any], keys: list[str], value: Any, where: str) -> None:
    """data[k0][k1]... = value; the mappings on the way must exist, and the key must be valid there."""
    node: Any = data
    for depth, key in enumerate(keys):
        known = known_keys(Recipe, keys[:depth])
        if not isinstance(node, dict):
            parent = key_path(keys[:depth])
            got = "null" if node is None else type(node).__name__
            raise PaleyError(f"{where}: {parent} is {got} and has no key {key!r}; set {parent} as a whole")
        if key not in known:
            path = key_path(keys[: depth + 1])
            raise PaleyError(f"{where}: unknown key {path}{nearest_name(key, known)}; known here: {', '.join(known)}")
        if depth < len(keys) - 1:
            node = node[key]
        else:
            node[key] = value
