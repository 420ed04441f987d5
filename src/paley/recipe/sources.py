"""Paths of texts in what is shared: a quantized folder goes to other people, and must not tell them about this machine.

A text file is named by its path from the folder, or as "…/NAME", which is never opened, if the two have no folder in
common but the root of the file system or what is above the user's own folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from paley.core.defaults import SELF
from paley.recipe.models import Recipe

__all__ = ["located", "located_source", "relative_source", "shared"]

_PARTS = ("calibration", "search", "test", "budget")
_NO_FILES = (SELF, "pydoc", "random")
_ELSEWHERE = "…/"


def shared(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe as a file in `folder` may have it."""
    return _changed(recipe, lambda source: relative_source(source, folder))


def located(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe in a file of `folder`, its texts where they are from here; those that are not there stay as named."""
    return _changed(recipe, lambda source: located_source(source, folder))


def located_source(source: str, folder: Path) -> str:
    """Where a text that a file of `folder` names is from here; as it is named if it is no file there."""
    if _is_no_file(source):
        return source
    path = Path(os.path.normpath(folder / source))
    return str(path) if not Path(source).is_absolute() and path.is_file() else source


def relative_source(source: str, folder: Path) -> str:
    """The name of a text in a file of `folder`; sources that are no files stay."""
    file = Path(os.path.realpath(source))
    if _is_no_file(source) or not (file.is_file() or Path(source).is_absolute()):
        return source
    folder, home = Path(os.path.realpath(folder)), Path(os.path.realpath(Path.home()))
    common = Path(os.path.commonpath([file, folder]))
    if common == common.parent or (common in home.parents and home != Path(home.root)):
        return _ELSEWHERE + file.name
    return Path(os.path.relpath(file, folder)).as_posix()


def _is_no_file(source: str) -> bool:
    return source in _NO_FILES or source.startswith(("hub:", _ELSEWHERE))


def _changed(recipe: Recipe, change: Callable[[str], str]) -> Recipe:
    found = {}
    for name in _PARTS:
        part = getattr(recipe, name)
        if part is not None and part.source is not None:
            found[name] = part.model_copy(update={"source": change(part.source)})
    return recipe.model_copy(update=found)
