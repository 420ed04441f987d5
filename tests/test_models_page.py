"""docs/models.md says what the rows and the outcomes say."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_page_is_what_its_script_makes(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from studies.models_page import OUT, OUTCOMES, page

    assert OUT.read_text() == page(json.loads(OUTCOMES.read_text())), "run python -m studies.models_page"
