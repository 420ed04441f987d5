"""The files beside a model's weights: JSON files, those of the tokenizer, and whatever else came with them."""

from __future__ import annotations

import fnmatch
import json
import shutil
from pathlib import Path

from paley.core.errors import PaleyError
from paley.core.files import disk, write_atomic

__all__ = ["OTHER_WEIGHTS", "all_files", "copy_companions", "write_json"]

# Weights in formats that are not read here.
OTHER_WEIGHTS = (
    "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.gguf", "*.npz", "*.tflite",
    "*.ot",
)  # fmt: skip
# What is not carried along: weights, what other tools take for a description of the weights, and what is written anew.
_NOT_COMPANIONS = (
    *OTHER_WEIGHTS, "*.safetensors", "*.safetensors.index*.json", "*.bin.index*.json", "*.onnx.data", "*.pkl",
    "*.npy", "*.pdparams", "*.mlmodel", "adapter_config.json", "hf_quant_config.json", "quantize_config.json",
    "quant_config.json", "config.json", "readme.md", "plan.json", "results.json", "digests.json",
)  # fmt: skip


def write_json(path: str | Path, obj: object) -> None:
    """Writes obj as strict JSON, keys in their order, indented, with a newline at the end."""
    try:
        text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise PaleyError(f"{path}: cannot be written as JSON: {error}") from None
    write_atomic(path, text + "\n")


def copy_companions(source: Path, folder: Path) -> None:
    """Copies every file of the folder `source`, and of folders in it, that is neither weights nor written anew."""
    for path in all_files(source):
        if not any(fnmatch.fnmatchcase(path.lower(), pattern) for pattern in _NOT_COMPANIONS):
            with disk(folder / path, (source / path).stat().st_size):
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / path, folder / path)


def all_files(folder: Path) -> list[str]:
    """Paths of all files in the folder, "/" between their parts, sorted; hidden ones and links to folders left out."""
    found = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            found += [] if path.is_symlink() else [f"{path.name}/{inner}" for inner in all_files(path)]
        elif path.is_file():
            found.append(path.name)
    return found
