"""Reports as one HTML file: pictures, their data as tables, light and dark, without a script."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from jinja2 import Environment
from markupsafe import Markup

from paley.core.errors import PaleyError, Setting
from paley.core.files import write_atomic
from paley.report.gather import Report, as_data

__all__ = ["MARK", "render", "write_page"]

MARK = "<!-- a report of Paley -->"


def render(reports: Sequence[Report]) -> str:
    """The page of one report, or of several side by side."""
    text = resources.files("paley").joinpath("report", "page.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["code"] = _code
    data = json.dumps([as_data(report) for report in reports], ensure_ascii=True).replace("<", "\\u003c")
    return environment.from_string(text).render(reports=reports, mark=MARK, data=data)


def _code(text: str) -> Markup:
    """Commands between backticks as <code>."""
    parts = text.split("`")
    return Markup("").join(Markup("<code>{}</code>").format(p) if i % 2 else p for i, p in enumerate(parts))


def write_page(reports: Sequence[Report], output: Path) -> None:
    """Writes the page; an older report is replaced, and nothing else."""
    if output.is_dir():
        raise PaleyError(f"{output}: is a folder", remedy=("name a file with ", Setting("output")))
    if output.exists() and not output.read_bytes()[:400].decode("utf-8", "replace").count(MARK):
        raise PaleyError(
            f"{output}: exists already, and is no report", remedy=("name another file with ", Setting("output"))
        )
    write_atomic(output, render(reports))
