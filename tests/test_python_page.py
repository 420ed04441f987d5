"""docs/python.md says what the docstrings say."""

from __future__ import annotations

from pathlib import Path

import paley

TOOLS = Path(__file__).resolve().parents[1] / "tools"


def test_the_page_is_what_its_script_makes(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    from make_python_page import OUT, SECTIONS, page

    assert sorted(" ".join(SECTIONS.values()).split()) == sorted(paley.__all__)
    assert OUT.read_text() == page(), "run python tools/make_python_page.py"
