"""The command line in this process, for the tests of its verbs."""

from __future__ import annotations

from types import SimpleNamespace

from typer.testing import CliRunner

from paley.cli import app


def paley_(*args: object, code: int = 0) -> SimpleNamespace:
    """Runs the command line -> its stdout and stderr; the exit code must be `code`."""
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, f"{result.exit_code}: {result.output}\n{result.exception!r}"
    return SimpleNamespace(out=result.stdout, err=result.stderr)
