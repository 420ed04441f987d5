"""Finds a model's folder and its tokenizer, without the part of transformers that models need: its import is slow."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from paley.core.errors import PaleyError
from paley.format.checkpoint import refuse_adapter
from paley.format.files import OTHER_WEIGHTS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["load_tokenizer", "resolve"]

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def resolve(model: str | Path) -> Path:
    """A local folder as it is; a Hub name `owner/name` downloaded, or from the cache; a folder for a GGUF file."""
    path = Path(model)
    if path.suffix == ".gguf" and path.is_file():
        from paley.model.gguf_source import gguf_folder

        return gguf_folder(path)
    if path.is_dir():
        refuse_adapter(path)
        return path
    if path.exists():
        raise PaleyError(f"{path}: is a file; give the folder of a Hugging Face checkpoint, or a GGUF file")
    if not _HUB_NAME.fullmatch(str(model)):
        raise PaleyError(f"{model}: no such folder, and no Hub name (owner/name) either")
    try:
        return Path(snapshot_download(str(model), ignore_patterns=[*OTHER_WEIGHTS, "consolidated*", "original/*"]))
    except LocalEntryNotFoundError as error:
        raise PaleyError(
            f"{model}: no such folder here, it is not in the local Hub cache, and the Hub cannot be reached; "
            "download it on a machine with network and give its folder"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise PaleyError(f"{model}: no such folder here, and the Hub does not give it: {error}") from error


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a local folder; PaleyError where there is none, or a damaged one."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the class itself is what tokenizers raises for JSON that is no tokenizer's
        raise PaleyError(f"{path}: no tokenizer can be loaded here: {' '.join(str(error).split())}") from error
