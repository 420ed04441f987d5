"""`paley push`: a quantized folder onto the Hugging Face Hub."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

import paley
from paley.cli import options
from paley.cli.app import verb
from paley.cli.process import line, say

__all__ = ["push_verb"]

Repository = Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Where to; it is made if it is not there.")]
Private = Annotated[
    bool | None, typer.Option("--private/--public", help="Of a new repository; else as your account prefers.")
]
Message = Annotated[str | None, typer.Option("--message", help="Of the commit.", metavar="TEXT")]


@verb("push")
def push_verb(
    folder: options.Folder,
    repository: Repository,
    private: Private = None,
    message: Message = None,
    as_json: options.Json = False,
) -> None:
    """Upload a folder that Paley wrote to the Hugging Face Hub, after every file was verified.

    README.md is the model's card; edit it before. Files that Paley did not write stay here. It needs a token that may
    write: `hf auth login`, or HF_TOKEN.

    Example: `paley push llama-w4 me/llama-w4 --private`
    """
    from paley.cli import display
    from paley.cli.progress import counting

    with counting("verifying") as on_file:
        made = paley.push(folder, repository, private=private, message=message, on_file=on_file)
    if as_json:
        display.emit(asdict(made))
        return
    if made.left_out:
        say(f"left out, as Paley did not write them: {', '.join(made.left_out)}")
    line(f"{made.files} files, {made.bytes:,} bytes: {made.url}")
