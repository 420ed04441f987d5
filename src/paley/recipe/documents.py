"""Files of ours that a person reads and diffs: JSON, strict, of one version, a line for each entry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar, Self

from pydantic import BaseModel, ConfigDict

from paley.core.errors import PaleyError
from paley.core.files import write_atomic
from paley.core.reading import read_json
from paley.recipe.saving import json_lines
from paley.recipe.validation import validate

__all__ = ["Document"]


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
        """The document in a file; raises where there is none, or no valid one of this version."""
        data = read_json(Path(path), cls.what)
        version = cls.model_fields["version"].default
        if data.get("version") != version:
            got = json.dumps(data.get("version"))
            raise PaleyError(f"{path}: is a {cls.what} of version {got}, this Paley reads version {version}")
        return validate(cls, data, str(path))
