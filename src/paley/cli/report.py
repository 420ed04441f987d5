"""`paley report` and `paley compare`: quantized folders as a page, and side by side."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from paley.cli import options
from paley.cli.app import verb
from paley.cli.process import line
from paley.core.errors import PaleyError, Setting

__all__ = ["compare_verb", "report_verb"]

Page = Annotated[
    Path | None, typer.Option("--output", help="The page; OUT-report.html beside the folder.", show_default=False)
]
ComparedPage = Annotated[Path | None, typer.Option("--output", help="Write a page with both.", show_default=False)]
Slopes = Annotated[
    Path | None,
    typer.Option(
        "--sensitivity", metavar="FILE", show_default=False,
        help="What `paley sensitivity` measured; without it, two figures are left out.",
    ),
]  # fmt: skip
Speed = Annotated[
    Path | None,
    typer.Option(
        "--speed", metavar="FILE", help="What `paley bench OUT --json` printed, as a file.", show_default=False
    ),
]
Open = Annotated[bool, typer.Option("--open", help="Show the page in a browser.")]
First = Annotated[Path, typer.Argument(metavar="A", help="A quantized folder.", show_default=False)]
Second = Annotated[Path, typer.Argument(metavar="B", help="Another one.", show_default=False)]


@verb("report", reads=True)
def report_verb(
    folder: options.Folder,
    against: options.Against = None,
    data: options.Data = None,
    sensitivity: Slopes = None,
    speed: Speed = None,
    output: Page = None,
    open_: Open = False,
) -> None:
    """Write a page that shows where the bytes and the errors of a quantized model are.

    It is one HTML file that needs no network. With --against, KL is measured token by token on a few sequences.

    Example: `paley report llama-w4 --against ./llama --open`
    """
    from paley.cli.progress import watching
    from paley.report import gather, write_page

    if data is not None and against is None:
        raise PaleyError(Setting("data"), ": is for what is measured", remedy=("give ", Setting("against"), " as well"))
    page = output or folder.resolve().with_name(f"{folder.resolve().name}-report.html")
    with watching() as monitor:
        report = gather(folder, against, sensitivity=sensitivity, speed=speed, data=data, monitor=monitor)
    write_page([report], page)
    line(f"written to {page}")
    for figure in report.figures:
        if figure.missing:
            line(f"not in it: {figure.title}; {figure.missing}")
    if open_:
        webbrowser.open(page.resolve().as_uri())


@verb("compare", reads=True)
def compare_verb(
    first: First,
    second: Second,
    against: options.Against = None,
    output: ComparedPage = None,
    open_: Open = False,
    as_json: options.Json = False,
) -> None:
    """Show two quantized models side by side: size, bits and scores; with --output also as a page.

    Example: `paley compare llama-w4 llama-w3 --output both.html`
    """
    from paley.cli import display
    from paley.cli.progress import watching
    from paley.report import gather, write_page
    from paley.report.gather import as_data

    if open_ and output is None:
        raise PaleyError("--open: there is no page to open", remedy=("name one with ", Setting("output")))
    if against is not None and output is None and not as_json:
        raise PaleyError(
            Setting("against"), ": what it measures is only on the page, and in JSON",
            remedy=("name a page with ", Setting("output"), ", or give --json"),
        )  # fmt: skip
    original = None
    if against is not None:
        from paley.report.measure import Original

        original = Original(against)  # measured once for both
    with watching() as monitor:
        reports = [gather(folder, original, monitor=monitor) for folder in (first, second)]
    if output is not None:
        write_page(reports, output)
        if open_:
            webbrowser.open(output.resolve().as_uri())
    if as_json:
        display.emit({"a": as_data(reports[0]), "b": as_data(reports[1])})
        return
    a, b = (dict(report.facts) for report in reports)
    names = [str(folder) for folder in (first, second)]
    display.show(
        display.table(("", *names), [(what, a.get(what, ""), b.get(what, "")) for what in dict.fromkeys([*a, *b])])
    )
    if output is not None:
        line(f"written to {output}")
