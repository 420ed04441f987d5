"""User-facing errors. A message names the place, the problem, the value received and a fix."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

__all__ = ["Call", "Message", "PaleyError", "Setting", "nearest_name", "renaming"]


@dataclass(frozen=True)
class Setting:
    """A setting or argument that a message names: 'test.seq_len', or 'test.seq_len=256' with a value.

    The library prints this name; the command line prints the option that the user typed.
    """

    name: str
    value: Any = None

    def __str__(self) -> str:
        return self.name if self.value is None else f"{self.name}={self.value}"


@dataclass(frozen=True)
class Call:
    """A function that a message advises: 'paley.measure_sensitivity(fold=True)'; a verb on the command line."""

    name: str
    settings: tuple[Setting, ...] = ()

    def __str__(self) -> str:
        return f"paley.{self.name}({', '.join(map(str, self.settings))})"


Part = str | Setting | Call
Message = Part | tuple[Part, ...]


class PaleyError(ValueError):
    """Bad input or a bad file. The command line prints the message and exits with 2.

    str() is "WHERE: PROBLEM, got GOT; REMEDY"; parts that are not given are left out. A problem may have several
    parts, strings and settings:
    PaleyError("exists already", where=path, remedy=("replace it with ", Setting("overwrite", True))).

    It is a ValueError, so that pydantic treats it as a validation error and adds the key.
    """

    def __init__(self, *problem: Part, where: object = "", got: object = None, remedy: Message = ()):
        super().__init__(*problem)
        self.where, self.got = str(where), got
        self.problem: tuple[Part, ...] = problem
        self.remedy: tuple[Part, ...] = remedy if isinstance(remedy, tuple) else (remedy,)

    def __str__(self) -> str:
        return self.render(str)

    def render(self, word: Callable[[Setting | Call], str]) -> str:
        """The sentence, with each setting and each call written by `word`."""
        parts: list[Part] = [f"{self.where}: "] if self.where else []
        parts += self.problem
        parts += [f", got {self.got}"] if self.got is not None else []
        parts += ["; ", *self.remedy] if self.remedy else []
        return "".join(part if isinstance(part, str) else word(part) for part in parts)

    def at(self, where: object) -> PaleyError:
        """The same error, for a place within `where`."""
        place = f"{where}: {self.where}" if self.where else where
        return PaleyError(*self.problem, where=place, got=self.got, remedy=self.remedy)

    def renamed(self, names: Mapping[str, str]) -> PaleyError:
        """The same error with other names for its settings: old -> new."""

        def new(parts: tuple[Part, ...]) -> tuple[Part, ...]:
            return tuple(replace(p, name=names.get(p.name, p.name)) if isinstance(p, Setting) else p for p in parts)

        return PaleyError(*new(self.problem), where=self.where, got=self.got, remedy=new(self.remedy))


@contextmanager
def renaming(names: Mapping[str, str]) -> Iterator[None]:
    """Errors raised inside name a function's own parameters instead of a recipe's settings: setting -> parameter."""
    try:
        yield
    except PaleyError as error:
        raise error.renamed(names) from error


def nearest_name(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known name closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
