"""A model to use: a quantized folder, or an ordinary checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from paley.core.errors import PaleyError, Setting
from paley.format.spec import QUANT_METHOD
from paley.model.folders import resolve

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["check_device", "is_paley", "load_any"]


def check_device(name: str) -> str:
    """-> name, if torch can put a model there."""
    where = Setting("device", name)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise PaleyError(where, ": no such device", remedy="use cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise PaleyError(where, ": is not supported", remedy="use cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise PaleyError(where, f": torch sees {torch.cuda.device_count()} CUDA devices here", remedy="use cpu")
    return name


def is_paley(folder: Path) -> bool:
    """Whether config.json says that the model is in our format; False if it cannot be read."""
    try:
        section = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        return section["quant_method"] == QUANT_METHOD
    except (OSError, ValueError, LookupError, TypeError):
        return False


def load_any(model: str | Path, device: str = "cpu", *, kernels: bool = False) -> PreTrainedModel:
    """A Paley folder, or an ordinary checkpoint (folder or Hub name).

    kernels: multiply by the fastest products there are here. Scores do without, so that the native library does not
    matter to them.
    """
    from paley import hf
    from paley.model.loading import open_source
    from paley.ops.matmul import EXACT

    path = resolve(str(model))
    if is_paley(path):
        return hf.load(path, device=device, product="auto" if kernels else EXACT)
    return open_source(path).load(device=device)
