"""A headless Chromium for the tests of pages; they are skipped where none is installed."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator

import pytest

__all__ = ["chromium"]

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


@contextlib.contextmanager
def chromium(*, width: int = 1000, height: int = 800, dark: bool = False, expected: str = "") -> Iterator:
    """-> a page; an error on its console fails the test, unless it has the text `expected`."""
    path = next(filter(None, map(shutil.which, _NAMES)), None)
    if path is None:
        pytest.skip(f"needs a browser: none of {', '.join(_NAMES)} is installed (apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, of paley[dev]")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page(
            viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
        )  # fmt: skip
        page.set_default_timeout(15_000)
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        yield page
        browser.close()
    assert [text for text in problems if not expected or expected not in text] == []
