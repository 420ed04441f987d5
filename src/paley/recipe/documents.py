"""Files of ours that a person reads and diffs: JSON, strict, of one version, a line for each entry."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer

from paley.core.errors import PaleyError
from paley.core.files import write_atomic
from paley.core.reading import read_json
from paley.recipe.saving import json_lines
from paley.recipe.validation import validate

__all__ = ["AnyFloat", "Document"]

# JSON has no word for these numbers, and a search may well meet an infinite perplexity.
_NON_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def _from_name(value: Any) -> Any:
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def _to_name(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


AnyFloat = Annotated[float, BeforeValidator(_from_name), PlainSerializer(_to_name, when_used="json")]


class Document(BaseModel):
    """A subclass gives `what`, its name in messages, and a field `version` whose default is the one it reads."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    what: ClassVar[str]

    def to_json(self) -> str:
        """The file's text: the same for equal documents, one line for each entry of its maps and lists."""
        return json_lines(self.model_dump(mode="json"), levels=2) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the file; it is either the old one or the whole new one, also where this is cut off."""
        write_atomic(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The document in a file; raises if there is none, or no valid one of this version."""
        data = read_json(Path(path), cls.what)
        version = cls.model_fields["version"].default
        if data.get("version") != version:
            got = json.dumps(data.get("version"))
            raise PaleyError(f"{path}: is a {cls.what} of version {got}, this Paley reads version {version}")
        return validate(cls, data, str(path))
