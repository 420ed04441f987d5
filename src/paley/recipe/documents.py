"""JSON files that a person can read and diff: strict, with a version, a line for each entry."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer

from paley.core.errors import PaleyError
from paley.core.files import write_atomic
from paley.core.plain_grids import with_points, without_points
from paley.core.reading import read_json
from paley.recipe.saving import json_lines
from paley.recipe.validation import validate

__all__ = ["AnyFloat", "Document"]

# JSON cannot write these numbers, and a search may meet an infinite perplexity.
_NON_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def _from_name(value: Any) -> Any:
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def _to_name(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


AnyFloat = Annotated[float, BeforeValidator(_from_name), PlainSerializer(_to_name, when_used="json")]


class Document(BaseModel):
    """A subclass defines `what`, its name in messages, and a field `version` with the version that it reads."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    what: ClassVar[str]

    def to_json(self) -> str:
        """The file's text: the same for equal documents, one line for each entry of its maps and lists."""
        return json_lines(without_points(self.model_dump(mode="json")), levels=2) + "\n"

    def save(self, path: str | Path) -> None:
        """Writes the file. If this is cut off, the old file stays."""
        write_atomic(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The document in a file; raises if there is none, if it is invalid, or of another version."""
        data = read_json(Path(path), cls.what)
        version = cls.model_fields["version"].default
        if data.get("version") != version:
            got = json.dumps(data.get("version"))
            raise PaleyError(f"{path}: is a {cls.what} of version {got}, this Paley reads version {version}")
        return validate(cls, with_points(data, str(path)), str(path))
