"""The page to chat on: one file without any other, and the policy that lets it run nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources

__all__ = ["PAGE", "POLICY"]

PAGE = resources.files("paley").joinpath("serve", "page.html").read_text(encoding="utf-8")


def _hashes(tag: str) -> str:
    parts = re.findall(rf"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'" for part in parts)


POLICY = (
    f"default-src 'none'; script-src {_hashes('script')}; style-src {_hashes('style')}; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
