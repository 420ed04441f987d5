"""The Typer application: what all verbs share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, TypeVar

import typer

import paley
from paley.cli.process import ReadingVerb, Verb, Verbs, line

__all__ = ["app", "verb"]

F = TypeVar("F", bound=Callable[..., None])

app = typer.Typer(
    cls=Verbs,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
)


def verb(name: str, *, reads: bool = False) -> Callable[[F], F]:
    """Makes a function a verb of the command line; reads: see `ReadingVerb`."""
    return app.command(name, cls=ReadingVerb if reads else Verb)


def _version(wanted: bool) -> None:
    if wanted:
        line(f"paley {paley.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Quantizes Hugging Face causal language models to 4, 3 or 2 bits: weights, activations and KV cache.

    Start with: `paley quantize MODEL --preset w4a4kv4 --output OUT`
    """
