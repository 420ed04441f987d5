"""How long does `paley report` take, alone and beside the original? Whole commands; medians of --rounds."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.record import RESULTS, provenance, save


def seconds(folder: Path, page: Path, *options: str) -> float:
    command = [Path(sys.executable).with_name("paley"), "report", folder, "--output", page, *options]
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a quantized folder")
    parser.add_argument("--original", required=True, help="what it was made from")
    parser.add_argument("--data", default="", help="the text of its scores, if it is elsewhere")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    text = ("--data", arguments.data) if arguments.data else ()
    load, rows = [os.getloadavg()[0]], {}
    with tempfile.TemporaryDirectory() as temporary:
        page = Path(temporary, "report.html")
        for name, options in (("alone", ()), ("against the original", ("--against", arguments.original, *text))):
            times = [seconds(arguments.folder, page, *options) for _ in range(arguments.rounds)]
            rows[name] = {"seconds": statistics.median(times), "bytes": page.stat().st_size}
            print(name, rows[name], flush=True)
    load.append(os.getloadavg()[0])
    result = provenance() | {"folder": arguments.folder.name, "load": load, "rows": rows}
    save(result, RESULTS / "report.json")


if __name__ == "__main__":
    main()
