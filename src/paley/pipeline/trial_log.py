"""Trials of a measurement in a file of their own, so that a killed one goes on where it was."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from paley.core.errors import PaleyError
from paley.format.folders import hold
from paley.methods.sensitivity import Delta

__all__ = ["remembering"]


@contextmanager
def remembering(delta: Delta, file: str | Path | None, settings: dict[str, object]) -> Iterator[Delta]:
    """delta that takes trials known from the file, and adds new ones to it; a kill loses the trial at work."""
    if file is None:
        yield delta
        return
    file = Path(file)
    try:
        log = file.open("a+", encoding="utf-8")
    except OSError as error:
        raise PaleyError(f"{file}: cannot be written ({error})") from None
    with log:
        hold(log, file)
        log.seek(0)
        text = log.read()
        whole = text[: text.rfind("\n") + 1]
        log.truncate(len(whole.encode()))  # a last line that a kill cut off
        known = _known_trials(file, whole, settings)
        if not whole:
            log.write(json.dumps(settings) + "\n")

        def remembered(slot: str, t: float, draw: int) -> float:
            if (slot, draw) not in known:
                known[slot, draw] = value = delta(slot, t, draw)
                if math.isfinite(value):
                    log.write(json.dumps({"slot": slot, "level": draw, "delta": value}) + "\n")
                    log.flush()
            return known[slot, draw]

        yield remembered


def _known_trials(file: Path, text: str, settings: dict[str, object]) -> dict[tuple[str, int], float]:
    """(slot, level) -> delta of each trial in the file, whose first line must be these settings."""
    try:
        first, *trials = [json.loads(line) for line in text.splitlines()] or [settings]
        known = {(str(t["slot"]), int(t["level"])): float(t["delta"]) for t in trials}
    except (ValueError, LookupError, TypeError) as error:
        raise PaleyError(f"{file}: is damaged ({error}); delete it, or start anew with --overwrite") from None
    if first != settings:
        raise PaleyError(
            f"{file}: the unfinished measurement there is of another model or other settings; repeat its command "
            "with --resume, or start anew with --overwrite"
        )
    return known
