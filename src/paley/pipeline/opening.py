"""Opens a model for reading and writing text: its decoder, its tokenizer, and the tokens that end a text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from paley import kernels
from paley.core.errors import PaleyError
from paley.core.reading import read_json
from paley.model.folders import load_tokenizer, resolve
from paley.pipeline.any_model import check_device, is_paley, load_any
from paley.pipeline.decoder import Decoder
from paley.runtime import Engine, why_not

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["TextModel", "open_decoder", "open_text_model", "why_no_engine"]


@dataclass(frozen=True)
class TextModel:
    """What generation needs of a model; ends: the tokens after which a text is finished.

    reason: why transformers runs the model, and not the native engine; None if the engine does.
    """

    decoder: Decoder
    tokenizer: PreTrainedTokenizerBase
    ends: frozenset[int]
    reason: str | None = "the model came in memory"

    @property
    def engine(self) -> str:
        """What reads tokens."""
        return "native" if self.reason is None else "transformers"


def open_decoder(path: str | Path, device: str = "cpu") -> Decoder:
    """The fastest decoder there is here for a quantized folder, or any other model's folder or Hub name."""
    folder = resolve(str(path))
    if why_no_engine(folder, device) is None:
        return Engine.open(folder)
    from paley.model.decoder import ModelDecoder

    return ModelDecoder(load_any(folder, device, kernels=True))


def why_no_engine(folder: Path, device: str = "cpu") -> str | None:
    """Why transformers runs the model in `folder`, and not the engine; None if the engine does."""
    if torch.device(check_device(device)).type != "cpu":
        return f"the engine runs on the CPU, not on {device}"
    if kernels.backend() != "native":
        return kernels.native.why_missing() or "PALEY_BACKEND=reference"
    if not is_paley(folder):
        return "the model is not quantized by Paley"
    return why_not(folder)


def open_text_model(
    model: PreTrainedModel | str | Path, device: str = "cpu", tokenizer: PreTrainedTokenizerBase | None = None
) -> TextModel:
    """Of a folder or Hub name, which is put on `device`; or of a model in memory, with its tokenizer."""
    if not isinstance(model, str | Path):
        from paley.model.decoder import ModelDecoder

        if tokenizer is None:
            raise PaleyError("a model in memory comes without its tokenizer", remedy="give tokenizer=")
        named = [getattr(part, "eos_token_id", None) for part in (model.generation_config, model.config)]
        return TextModel(ModelDecoder(model), tokenizer, _ends(tokenizer, *named))
    check_device(device)
    path = resolve(str(model))
    tokenizer = tokenizer or load_tokenizer(path)
    files = [path / name for name in ("generation_config.json", "config.json")]
    named = [read_json(file).get("eos_token_id") for file in files if file.is_file()]
    reason = why_no_engine(path, device)
    return TextModel(open_decoder(path, device), tokenizer, _ends(tokenizer, *named), reason)


def _ends(tokenizer: PreTrainedTokenizerBase, *named: object) -> frozenset[int]:
    """Of the tokenizer and of what configs name: a token, a list of tokens, or nothing."""
    found = [tokenizer.eos_token_id, *named]
    return frozenset(t for each in found for t in (each if isinstance(each, list) else [each]) if type(t) is int)
