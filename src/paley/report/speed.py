"""The speed of a folder, from the file that `paley bench OUT --json` printed into."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, field_validator

from paley.core.errors import PaleyError
from paley.core.reading import read_json
from paley.recipe.validation import validate
from paley.report.charts import Bar, bars
from paley.report.figures import Figure

__all__ = ["SpeedFile", "speeds"]

_THIS = "this model"
Rate = Annotated[FiniteFloat, Field(ge=1e-3, le=1e9)]
Count = Annotated[int, Field(ge=1)]


class _Speed(BaseModel):
    """Tokens a second."""

    model_config = ConfigDict(frozen=True)

    prefill: Rate
    decode: Rate


class SpeedFile(BaseModel):
    """What the report shows of a measurement, as of `paley.Bench`; other keys are not read."""

    model_config = ConfigDict(frozen=True)

    folder: str
    engine: str
    threads: Count
    prompt_tokens: Count
    new_tokens: Count
    speed: _Speed
    rivals: dict[str, _Speed]
    share: Annotated[FiniteFloat, Field(gt=0)] | None = None

    @field_validator("rivals")
    @classmethod
    def _has_other_names(cls, rivals: dict[str, _Speed]) -> dict[str, _Speed]:
        if _THIS in rivals:
            raise ValueError(f"none is called {_THIS!r}")
        return rivals

    @classmethod
    def load(cls, file: Path, folder: Path) -> SpeedFile:
        """The file's content; PaleyError if it is something else, or about a folder of another name."""
        of = folder.resolve().name
        again = f"`paley bench {of} --json > {file.name}` writes it"
        try:
            found = validate(cls, read_json(file, "file of speeds"), str(file))
        except PaleyError as error:
            raise PaleyError(str(error), remedy=again) from None
        # "." and ".." have no name to compare; a link has its own and the folder's.
        if (name := Path(found.folder).name) not in ("", "..", of, folder.name):
            raise PaleyError(f"{file}: has the speed of {name}, this folder is {of}", remedy=again)
        return found


def speeds(found: SpeedFile | None, name: str) -> Figure:
    """Tokens a second of the folder called `name`, and of what took turns with it."""
    if found is None:
        missing = f"`paley bench {name} --json > speed.json`, then `paley report {name} --speed speed.json`"
        return Figure("speed", "Speed", "", missing=missing)
    rows = {_THIS: found.speed, **found.rivals}
    svg = _chart(f"Reading a prompt of {found.prompt_tokens} tokens", {who: each.prefill for who, each in rows.items()})
    svg += _chart(f"Writing {found.new_tokens} tokens", {who: each.decode for who, each in rows.items()})
    how = "the native engine" if found.engine == "native" else found.engine
    threads = "one thread" if found.threads == 1 else f"{found.threads} threads"
    words = f"Tokens a second on {how} with {threads}, medians of one run."
    if found.share is not None:
        words += f" To write, this model reads {found.share:.0%} of the bytes a second that memory gives."
    table = tuple((who, f"{each.prefill:.1f}", f"{each.decode:.1f}") for who, each in rows.items())
    return Figure("speed", "Speed", words, ("model", "prompt, tokens/s", "new, tokens/s"), table, svg)


def _chart(title: str, rows: dict[str, float]) -> str:
    kinds = {who: "c0" if who == _THIS else "total" for who in rows}
    return bars([Bar(who, 0, each, f"{each:,.1f}", kinds[who]) for who, each in rows.items()], title, heading=True)
