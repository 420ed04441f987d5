"""`paley verify`: whether a folder is as it was written."""

from __future__ import annotations

from dataclasses import asdict

import paley
from paley.cli import options
from paley.cli.app import verb
from paley.cli.process import line

__all__ = ["verify_verb"]


@verb("verify", reads=True)
def verify_verb(folder: options.Folder, as_json: options.Json = False) -> None:
    """Read every file of a folder that Paley wrote, and compare it with what was written.

    Damage ends in exit code 2, and the line names the file, the tensor or the key of the config. Files that were added
    since, and an edited README.md, are named; they are no damage. Loading a model checks its tensors and its config
    anyway, but not the tokenizer's files.

    Example: `paley verify llama-w4`
    """
    from paley.cli import display
    from paley.cli.progress import counting

    with counting("verifying") as on_file:
        found = paley.verify(folder, on_file=on_file)
    if as_json:
        display.emit(asdict(found) | {"folder": str(found.folder)})
        return
    parts = [f"{found.files} files as written", f"{found.bytes:,} bytes"]
    parts.append(f"{found.bytes / 1e6 / max(found.seconds, 1e-9):,.0f} MB/s")
    parts += [f"edited: {', '.join(found.edited)}"] if found.edited else []
    parts += [f"not covered: {', '.join(found.not_covered)}"] if found.not_covered else []
    line(f"{found.folder}: {'; '.join(parts)}")
