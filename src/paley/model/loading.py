"""Opens the model to be quantized: a folder or a Hub name, checked before anything is computed."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from paley.arch import Sites, family, sites
from paley.core.errors import PaleyError, Setting, nearest_name
from paley.format.checkpoint import Checkpoint

__all__ = [
    "Source", "check_fit", "check_seq_len", "empty_model", "is_ignored", "join_tie", "load_tokenizer", "open_source",
    "read_config", "resolve", "tied_partners",
]  # fmt: skip

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True)
class Source:
    """A checked checkpoint folder of a supported family; `fingerprint` names its contents.

    In `checkpoint` a tied pair stands once, as the embedding, under whichever names the files hold it.
    skeleton: the model without its weights. sites: its places where a tensor can be quantized.
    """

    path: Path
    checkpoint: Checkpoint
    fingerprint: str
    config: Any
    skeleton: PreTrainedModel
    sites: Sites

    def load(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> PreTrainedModel:
        """The model in eval mode; raises where the files and the config disagree."""
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                self.path, config=self.config, dtype=dtype, use_safetensors=True, local_files_only=True,
                trust_remote_code=False, output_loading_info=True, attn_implementation="sdpa",
            )  # fmt: skip
        except PaleyError:
            raise
        except (RuntimeError, ValueError) as error:
            raise PaleyError(f"{self.path}: transformers cannot load this checkpoint: {error}") from error
        model, info = loaded
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if names := sorted(str(name) for name in info[what]):
                raise PaleyError(
                    f"{self.path}: config.json and the weights disagree: {what.replace('_keys', '')} "
                    f"{len(names)} tensors, the first is {names[0]}; use the config.json these weights came with"
                )
        model.requires_grad_(False)
        return model.eval().to(device)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that came with the weights."""
        return load_tokenizer(self.path)


def join_tie(path: Path, checkpoint: Checkpoint, config: Any) -> Checkpoint:
    """The checkpoint with the embedding alone where the config ties lm_head to it; raises where the two differ.

    transformers writes the embedding and reads either name; there are files with lm_head.weight alone.
    """
    row = family(config.model_type)
    head, embedding = f"{row.head}.weight", f"{row.embedding}.weight"
    if not config.tie_word_embeddings or head not in checkpoint:
        return checkpoint
    if embedding in checkpoint and not torch.equal(checkpoint.tensor(head), checkpoint.tensor(embedding)):
        raise PaleyError(
            f"{path}: config.json says tie_word_embeddings, but {head} is not {embedding}; set it to false there if "
            "the head is meant to be its own, or remove the tensor"
        )
    infos = dict(checkpoint.infos)
    infos[embedding] = infos.pop(head)
    return Checkpoint(checkpoint.folder, checkpoint.config, infos)


def read_config(path: Path) -> Any:
    """The configuration in a local folder, as transformers understands it; PaleyError where it does not."""
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise PaleyError(f"{path}/config.json: transformers does not understand it: {error}") from error


def empty_model(config: Any) -> PreTrainedModel:
    """The model that a config describes, without weights, in eval mode."""
    config = copy.deepcopy(config)  # from_config writes the dtype into what it is given
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    return model.eval()


def check_fit(folder: Path, shapes: Mapping[str, tuple[int, ...]], model: PreTrainedModel) -> None:
    """Raises unless tensors of these names and shapes, those of a folder, are just what fills the model."""
    partners, wanted = tied_partners(model), model.state_dict()
    for name, tensor in wanted.items():
        if name not in shapes:
            if partners.get(name) in shapes:
                continue
            raise PaleyError(f"{folder}: no tensor {name!r}{nearest_name(name, shapes)}")
        if shapes[name] != tuple(tensor.shape):
            raise PaleyError(
                f"{folder}: config.json and the weights disagree: {name} has shape {list(shapes[name])}, the config "
                f"makes it {list(tensor.shape)}; use the config.json these weights came with"
            )
    if extra := [name for name in shapes if name not in wanted and not is_ignored(name, model)]:
        raise PaleyError(
            f"{folder}: config.json and the weights disagree: {len(extra)} tensors too many, the first is "
            f"{extra[0]}; use the config.json these weights came with"
        )


def tied_partners(model: PreTrainedModel) -> dict[str, str]:
    """Of each tied weight's names the other one: a file may hold it under either."""
    tied = model.all_tied_weights_keys
    return {**tied, **{source: target for target, source in tied.items()}}


def is_ignored(name: str, model: PreTrainedModel) -> bool:
    """Whether transformers passes a tensor of this name over: old checkpoints hold tables that are computed now."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(re.search(pattern, name) for pattern in patterns) or name.endswith("rotary_emb.inv_freq")


def check_seq_len(config: Any, lengths: Mapping[str, int]) -> None:
    """Raises where one of the lengths, by the names of their settings, is beyond what the model was made to read."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None:
        return
    if long := {name: length for name, length in lengths.items() if length > limit}:
        found = [part for name, length in long.items() for part in (", ", Setting(name, length))]
        less = [part for name in long for part in (" ", Setting(name, limit))]
        raise PaleyError(
            *found[1:],
            f": this model reads sequences of at most {limit} tokens (max_position_embeddings)",
            remedy=("set", *less, ", or less"),
        )


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a local folder; PaleyError where there is none, or a damaged one."""
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, LookupError, TypeError) as error:  # the last two: JSON, but no tokenizer's
        raise PaleyError(f"{path}: no tokenizer can be loaded here: {error}") from error


def open_source(model: str | Path) -> Source:
    """Checks the folder or Hub name `model`: architecture, files, and that every weight is finite."""
    path = resolve(model)
    checkpoint = Checkpoint.open(path)
    config = read_config(path)
    row = family(config.model_type)
    if getattr(config, "quantization_config", None) is not None:
        raise PaleyError(f"{path}: is quantized already; give the original, full-precision checkpoint")
    fingerprint = checkpoint.fingerprint(check_finite=True)
    checkpoint, skeleton = join_tie(path, checkpoint, config), empty_model(config)
    check_fit(path, {name: info.shape for name, info in checkpoint.infos.items()}, skeleton)
    return Source(path, checkpoint, fingerprint, config, skeleton, sites(row, config))


def resolve(model: str | Path) -> Path:
    """A local folder as it is; a Hub name `owner/name` downloaded, or taken from the local cache."""
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists():
        raise PaleyError(f"{path}: is a file; give the folder of a Hugging Face checkpoint")
    if not _HUB_NAME.fullmatch(str(model)):
        raise PaleyError(f"{model}: no such folder, and no Hub name (owner/name) either")
    try:
        return Path(snapshot_download(str(model), allow_patterns=_FILES))
    except LocalEntryNotFoundError as error:
        raise PaleyError(
            f"{model}: no such folder here, it is not in the local Hub cache, and the Hub cannot be reached; "
            "download it on a machine with network and give its folder"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise PaleyError(f"{model}: no such folder here, and the Hub does not give it: {error}") from error
