"""The files beside a model's weights: JSON files, and those of the tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from paley.core.errors import PaleyError
from paley.core.files import disk, write_atomic

__all__ = ["copy_companions", "write_json"]

# Copied unchanged. Everything else in a model's folder is weights, or no part of the model.
_COMPANIONS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def write_json(path: str | Path, obj: object) -> None:
    """Writes obj as strict JSON, keys in their order, indented, with a newline at the end."""
    try:
        text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise PaleyError(f"{path}: cannot be written as JSON: {error}") from None
    write_atomic(path, text + "\n")


def copy_companions(source: Path, folder: Path) -> None:
    """Copies tokenizer, generation config and chat template from the folder `source` into `folder`."""
    for name in _COMPANIONS:
        if (source / name).is_file():
            with disk(folder / name, (source / name).stat().st_size):
                shutil.copyfile(source / name, folder / name)
