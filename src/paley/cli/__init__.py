"""The command line `paley`: argument parsing, progress and tables; what is computed is computed elsewhere."""

from paley.cli import making, measuring, undoing, using  # the verbs, in the order of --help
from paley.cli.app import app

__all__ = ["app", "making", "measuring", "undoing", "using"]
