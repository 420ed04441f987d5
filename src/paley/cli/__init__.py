"""The command line `paley`: argument parsing, progress and tables; what is computed is computed elsewhere."""

from paley.cli import making, measuring, undoing, using  # the verbs, in the order of --help
from paley.cli.app import app

__all__ = ["app", "main", "making", "measuring", "undoing", "using"]


def main() -> None:
    """The console script."""
    app(prog_name="paley")
