"""The command line `paley`: argument parsing, progress and tables; what is computed is computed elsewhere."""

from paley.cli import exporting, making, measuring, using  # the verbs, in the order of --help
from paley.cli.app import app

__all__ = ["app", "exporting", "main", "making", "measuring", "using"]


def main() -> None:
    """The console script."""
    app(prog_name="paley")
