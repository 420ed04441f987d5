"""What a long run tells the outside while it works; the command line draws it, libraries may ignore it."""

from __future__ import annotations

__all__ = ["Monitor"]


class Monitor:
    """Silent by default; override what you want to see."""

    def stage(self, name: str, total: int) -> None:
        """A stage of `total` steps begins."""

    def step(self, detail: str = "") -> None:
        """One step of the stage is done; `detail` says which, and what came out."""

    def note(self, text: str) -> None:
        """Something worth a line that stays."""
