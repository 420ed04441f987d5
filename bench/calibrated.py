"""What does a calibrated run cost beside an older build? python -m bench.calibrated MODEL --text T --test-text S

--against CHECKOUT: another checkout of Paley with its native library built; both work on the first --layers blocks of
MODEL, in turn, each in a process of its own. Seconds by stage, peak memory, and the KL of such a stump, which says
only that both do the same work.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.record import RESULTS, provenance, save
from safetensors.torch import load_file, save_file

# Runs in both builds, so it knows only what both have.
RUN = """
import json, resource, sys, time, torch, paley
from paley.pipeline.monitor import Monitor
from paley.recipe import apply_settings, preset

class Clock(Monitor):
    def __init__(self):
        self.stages, self.name, self.start = {}, "start", time.perf_counter()
    def stage(self, name, total):
        now = time.perf_counter()
        self.stages[self.name] = self.stages.get(self.name, 0.0) + now - self.start
        self.name, self.start = name, now

model, name, output, *settings = sys.argv[1:]
x, w = torch.ones(2048, 576), torch.ones(576, 1536)
torch.mm(x, w)
start = time.perf_counter()
for _ in range(20):
    torch.mm(x, w)
rate = 20 * 2 * 2048 * 576 * 1536 / (time.perf_counter() - start)
clock = Clock()
made = paley.quantize(model, apply_settings(preset(name), settings), output=output, monitor=clock)
clock.stage("", 0)
measured = json.load(open(output + "/results.json"))["evaluation"]
print(json.dumps({
    "seconds": clock.stages, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    "kl": measured["kl"], "kl_stderr": measured["kl_stderr"], "float32_flops": rate,
}))
"""


def stump(model: Path, layers: int, folder: Path) -> None:
    """Writes the model with its first blocks alone."""
    folder.mkdir()
    for file in model.iterdir():
        if file.suffix in (".json", ".jinja", ".txt", ".model"):
            shutil.copy(file, folder)
    config = json.loads((model / "config.json").read_text())
    config["num_hidden_layers"] = layers
    if config.get("layer_types"):
        config["layer_types"] = config["layer_types"][:layers]
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(model / "model.safetensors")
    blocks = tuple(f"model.layers.{index}." for index in range(layers))
    kept = {name: t for name, t in tensors.items() if not name.startswith("model.layers.") or name.startswith(blocks)}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def run(checkout: Path, model: Path, preset: str, settings: list[str]) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        made = subprocess.run(
            [sys.executable, "-c", RUN, str(model), preset, f"{folder}/out", *settings],
            env=os.environ | {"PYTHONPATH": str(checkout / "src")}, capture_output=True, text=True,
        )  # fmt: skip
    if made.returncode:
        sys.exit(f"{checkout}: {made.stderr.strip().splitlines()[-1]}")
    return json.loads(made.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--test-text", type=Path, required=True)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--preset", default="w4a16e16h16")
    parser.add_argument("--against-preset", default="w4a16", help="what the older build calls it")
    parser.add_argument("--pairs", type=int, default=2)
    arguments = parser.parse_args()
    settings = [
        "search.method=none", "calibration.sequences=16", "calibration.seq_len=512", "test.sequences=4",
        "test.seq_len=512", f"calibration.source={arguments.text.resolve()}",
        f"test.source={arguments.test_text.resolve()}",
    ]  # fmt: skip
    builds = {"here": (Path(__file__).resolve().parents[1], arguments.preset)}
    if arguments.against is not None:
        builds["against"] = (arguments.against.resolve(), arguments.against_preset)
    runs: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        stump(arguments.model, arguments.layers, Path(folder) / "model")
        for pair in range(arguments.pairs):
            for name, (checkout, preset) in builds.items():
                commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True)
                made = run(checkout, Path(folder) / "model", preset, settings)
                runs.append({"build": name, "commit": commit.stdout.strip(), "pair": pair, "preset": preset, **made})
                weights = made["seconds"]["quantizing weights"]
                print(
                    f"{name}: weights {weights:.1f} s, peak {made['peak_bytes'] / 2**30:.2f} GiB, KL {made['kl']:.4f}"
                )
    what = {"model": arguments.model.name, "layers": arguments.layers, "calibration": "16 x 512", "test": "4 x 512"}
    save({**provenance(), **what, "runs": runs}, RESULTS / "calibrated.json")


if __name__ == "__main__":
    main()
