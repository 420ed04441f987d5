"""What `paley presets` tells of each name: size and loss on the model in `assets/`.

`python -m studies.presets` measures again what is not in the file yet, and writes src/paley/presets/measured.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import paley
from paley.recipe import apply_settings
from paley.recipe.presets import LISTED, MEASURED

ROOT = Path(__file__).parents[1]
SETTINGS = ["calibration.sequences=32", "test.sequences=16"]


def main() -> None:
    """Measures each listed preset."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--again", action="store_true", help="also those that are in the file")
    again = parser.parse_args().again
    file = ROOT / "src" / "paley" / "presets" / MEASURED
    found = {} if again or not file.exists() else json.loads(file.read_text(encoding="utf-8"))["presets"]
    for name in LISTED:
        if name in found:
            continue
        with tempfile.TemporaryDirectory() as folder:
            recipe = apply_settings(paley.preset(name), SETTINGS)
            results = paley.quantize(ROOT / "assets" / "demo-model", recipe, output=Path(folder) / "out").results
        measured = results.evaluation
        assert measured is not None
        found[name] = {
            "bytes": results.bytes, "bits_per_weight": results.bits_per_weight,
            "kl": measured.kl, "kl_stderr": measured.kl_stderr, "gap": measured.gap,
            "kv_cache_bytes_per_token": measured.kv_cache_bytes_per_token,
        }  # fmt: skip
        print(name, found[name], flush=True)
        whole = {
            "model": "assets/demo-model", "command": "python -m studies.presets", "settings": SETTINGS,
            "original_bytes": results.original_bytes, "tokens": measured.tokens, "presets": found,
        }  # fmt: skip
        file.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
