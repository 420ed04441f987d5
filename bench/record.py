"""What the scripts share: where a measurement was made, and the JSON file that keeps it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from pathlib import Path

import torch

from paley.pipeline.monitor import Monitor

__all__ = ["DEMO", "RESULTS", "Clock", "provenance", "save"]

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "assets" / "demo-model"
RESULTS = Path(__file__).parent / "results"


def provenance() -> dict:
    """-> commit (+changes where the library's sources differ from it), machine and threads."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], capture_output=True, text=True, cwd=ROOT).stdout.strip()

    return {
        "commit": git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", "src", "csrc") else ""),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "threads": torch.get_num_threads(),
    }


def save(result: dict, file: Path) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")


class Clock(Monitor):
    """Seconds of each stage of a run, from here on to `end`; what comes before the first stage is `start`."""

    def __init__(self) -> None:
        self.stages: dict[str, float] = {}
        self._name, self._began = "start", time.monotonic()

    def stage(self, name: str, total: int) -> None:
        self.end()
        self._name = name

    def end(self) -> None:
        now = time.monotonic()
        self.stages[self._name] = self.stages.get(self._name, 0.0) + now - self._began
        self._began = now
