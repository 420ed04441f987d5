"""Opens the model to be quantized: a folder or a Hub name, checked before anything is computed."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from paley.arch import FAMILIES, Sites
from paley.core.errors import PaleyError, Setting, nearest_name
from paley.core.reading import read_json
from paley.format.checkpoint import Checkpoint
from paley.format.config import QUANT_METHOD
from paley.format.decoding import Float8, as_stored, decode
from paley.format.header import NAMES, TensorInfo
from paley.model.adapter import Adapter
from paley.model.checks import check_config, check_family, check_layers
from paley.model.converting import convert
from paley.model.folders import load_tokenizer, resolve
from paley.model.keys import MEAN_KEYS
from paley.model.pages import Pages, empty_
from paley.model.placing import belongs, place, summed_up
from paley.model.text_part import text_part
from paley.model.walk import sites_of

__all__ = [
    "Source", "check_fit", "check_seq_len", "context_of", "default_attention", "empty_model", "filled", "is_ignored",
    "join_tie", "open_source", "plain_attention", "read_config", "tied_partners", "without_values",
]  # fmt: skip

# What tools say of their quantized weights: transformers', the older compressed-tensors', MLX's.
_ENTRIES = ("quantization_config", "compression_config", "quantization")
_CONTEXT = ("max_position_embeddings", "max_target_positions", "max_seq_len")  # Whisper's decoder; MPT


@dataclass(frozen=True)
class Source:
    """A checked checkpoint folder of a supported family; `fingerprint` names its contents.

    `checkpoint` has just the tensors that fill the model, under its names for them, decoded as they are read; a tied
    pair stands once, as the embedding. extra: tensors of the files that no module of the model reads.
    skeleton: the model without its weights. sites: its places where a tensor can be quantized. notes: what of the
    folder was read otherwise than it says.
    """

    path: Path
    checkpoint: Checkpoint
    fingerprint: str
    config: Any
    skeleton: PreTrainedModel
    sites: Sites
    extra: Mapping[str, TensorInfo] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def load(self, dtype: torch.dtype = torch.float32, device: str = "cpu", *, blocks: bool = True) -> PreTrainedModel:
        """The model in eval mode; raises where the files and the config disagree.

        blocks=False: what files hold of its blocks has no values, see `model.pages`.
        """
        absent = () if blocks else f"{self.sites.architecture.blocks}."
        tensors = {
            name: _Absent(info, dtype) if name.startswith(absent) else _Lazy(info)
            for name, info in self.checkpoint.infos.items()
        }
        model: Any
        try:
            model, info = filled(self.skeleton, self.config, tensors, dtype)
        except PaleyError:
            raise
        except (RuntimeError, ValueError) as error:
            raise PaleyError(f"{self.path}: transformers cannot load this checkpoint: {error}") from error
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if names := sorted(str(name) for name in info[what]):
                raise PaleyError(
                    f"{self.path}: config.json and the weights disagree: {what.replace('_keys', '')} "
                    f"{len(names)} tensors, the first is {names[0]}; use the config.json these weights came with"
                )
        if (self.path / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(self.path, local_files_only=True)
        model.requires_grad_(False)
        embedding: Any = model.get_input_embeddings()
        if (scale := getattr(embedding, "scalar_embed_scale", None)) is not None:
            embedding.embed_scale = torch.tensor(scale)  # a type of 16 bits has rounded it, which no .float() undoes
        model.eval().to(device)
        if not blocks:
            empty_(model.get_submodule(self.sites.architecture.blocks))
        return model

    @property
    def has_pages(self) -> bool:
        """Whether each of its blocks can be read by itself: no tensor serves two of them."""
        blocks = f"{self.sites.architecture.blocks}."
        return all(name in self.checkpoint for name in self.skeleton.state_dict() if name.startswith(blocks))

    def pages(self, adapter: Adapter) -> Pages:
        """What fills the blocks of a model that was loaded without them, in float32."""

        def read(name: str, like: torch.Tensor) -> torch.Tensor:
            if name.endswith(MEAN_KEYS):  # which attentions have got meanwhile
                return torch.zeros_like(like, device="cpu")
            tensor = self.checkpoint.tensor(name)
            return tensor.float() if tensor.is_floating_point() else tensor

        return Pages(adapter, read)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that came with the weights."""
        return load_tokenizer(self.path)


class _Lazy:
    """A tensor that transformers reads when it needs it, as it does those of safetensors files."""

    def __init__(self, info: TensorInfo):
        self.info = info

    def __getitem__(self, part: Any) -> torch.Tensor:
        return self.info.read()[part]

    def get_shape(self) -> list[int]:
        return list(self.info.shape)

    def get_dtype(self) -> str:
        return NAMES[self.info.dtype]


class _Absent(_Lazy):
    """Has the shape of a tensor and takes no memory; it has no values."""

    def __init__(self, info: TensorInfo, dtype: torch.dtype):
        super().__init__(info)
        self.dtype = dtype if info.dtype.is_floating_point else info.dtype

    def __getitem__(self, part: Any) -> torch.Tensor:
        return torch.empty(1, dtype=self.dtype, device="cpu").expand(self.info.shape)[part]


def without_values(shapes: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, Any]:
    """A state dict for `filled` of tensors of these shapes, which take no memory."""
    nowhere = Path()
    return {name: _Absent(TensorInfo(nowhere, t.dtype, tuple(t.shape), 0), dtype) for name, t in shapes.items()}


def filled(
    skeleton: PreTrainedModel, config: Any, tensors: Mapping[str, Any], dtype: torch.dtype
) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """-> (a model of the skeleton's class with these tensors and its own computed ones, what transformers tells)."""
    made: Any = type(skeleton).from_pretrained(
        None, config=copy.deepcopy(config), state_dict=dict(tensors), dtype=dtype, output_loading_info=True,
        attn_implementation=plain_attention(config),
    )  # fmt: skip
    return made


def join_tie(path: Path, checkpoint: Checkpoint, sites: Sites) -> Checkpoint:
    """The checkpoint with the embedding alone where the config ties lm_head to it; raises where the two differ.

    transformers writes the embedding and reads either name; there are files with lm_head.weight alone.
    """
    head, embedding = f"{sites.head.name}.weight", f"{sites.embedding.name}.weight"
    if not sites.tied or head not in checkpoint:
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
    """The configuration of the language model in a local folder, as transformers understands it.

    Errors: PaleyError where transformers does not, and for numbers that no model can have.
    """
    file = path / "config.json"
    raw = read_json(file)
    check_config(file, raw)
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the file is anybody's, and what its values lead to differs from family to family
        raise PaleyError(f"{file}: transformers does not understand it: {_one_line(error)}") from error
    part = text_part(path, config, raw)
    check_family(file, raw, config)
    return part


def default_attention(config: Any) -> str:
    """transformers' name of the attention that a model computes with if nobody asks for another."""
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return "sdpa" if kind is None or kind._supports_sdpa else "eager"


def plain_attention(config: Any) -> str:
    """transformers' name of the attention that a model computes with unless Paley's takes its place.

    Its sdpa attention passes over soft caps and sinks, which not every release of a family says.
    """
    row = FAMILIES.get(config.model_type)
    return "eager" if row is not None and (row.attention_softcap or row.sinks) else default_attention(config)


def empty_model(config: Any) -> PreTrainedModel:
    """The model that a config describes, without weights, in eval mode."""
    config = copy.deepcopy(config)  # from_config writes the dtype into what it is given
    try:
        attention = plain_attention(config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    except Exception as error:  # see `read_config`
        raise PaleyError(f"config.json: no {config.model_type} model can be made of it: {_one_line(error)}") from error
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


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def tied_partners(model: PreTrainedModel) -> dict[str, str]:
    """Of each tied weight's names the other one: a file may hold it under either."""
    tied = model.all_tied_weights_keys
    return {**tied, **{source: target for target, source in tied.items()}}


def is_ignored(name: str, model: PreTrainedModel) -> bool:
    """Whether transformers passes a tensor of this name over: old checkpoints hold tables that are computed now."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(re.search(pattern, name) for pattern in patterns) or name.endswith("rotary_emb.inv_freq")


def context_of(config: Any) -> int | None:
    """How many tokens a model was made to read, by whatever name its config has for it; None if it does not say."""
    limit = getattr(config, _context_key(config), None)
    return limit if type(limit) is int and limit > 0 else None


def _context_key(config: Any) -> str:
    return next((key for key in _CONTEXT if isinstance(getattr(config, key, None), int)), _CONTEXT[0])


def check_seq_len(config: Any, lengths: Mapping[str, int]) -> None:
    """Raises where one of the lengths, by the names of their settings, is beyond what the model was made to read."""
    limit = context_of(config)
    if limit is None:
        return
    if long := {name: length for name, length in lengths.items() if length > limit}:
        found = [part for name, length in long.items() for part in (", ", Setting(name, length))]
        less = [part for name in long for part in (" ", Setting(name, limit))]
        raise PaleyError(
            *found[1:],
            f": this model reads sequences of at most {limit} tokens ({_context_key(config)})",
            remedy=("set", *less, ", or less"),
        )


def open_source(model: str | Path) -> Source:
    """Checks the folder or Hub name `model`: architecture, files, and that every weight is finite."""
    path = resolve(model)
    files = Checkpoint.open(path)
    check_layers(path / "config.json", files.config, files.names)
    config = read_config(path)
    skeleton = empty_model(config)
    found, notes = _decoded(path, files, config, skeleton)
    fingerprint = files.fingerprint(check_finite=True)
    wanted = skeleton.state_dict()
    extra = {
        name: info
        for name, info in found.items()
        if name not in wanted and not is_ignored(name, skeleton) and not belongs(name, skeleton)
    }
    checkpoint = Checkpoint(path, files.config, {name: info for name, info in found.items() if name not in extra})
    extra = {stored: part for name, info in extra.items() for stored, part in as_stored(name, info).items()}
    found_sites = sites_of(skeleton)
    checkpoint = join_tie(path, checkpoint, found_sites)
    check_fit(path, {name: info.shape for name, info in checkpoint.infos.items()}, skeleton)
    if (kind := files.config.get("model_type")) != config.model_type:
        notes.append(f"the text part of this {kind} model is quantized, as an ordinary {config.model_type} model")
    return Source(path, checkpoint, fingerprint, config, skeleton, found_sites, extra, tuple(notes))


def _decoded(
    path: Path, files: Checkpoint, config: Any, skeleton: PreTrainedModel
) -> tuple[dict[str, TensorInfo], list[str]]:
    """-> (the files' tensors under the model's names, notes on formats that were decoded); the config loses its entry.

    Whether a model is quantized is told by its tensors: entries of the config are left over from other runs.
    """
    places = (files.config, config.to_dict())
    left, entry = next(((key, found) for key in _ENTRIES for each in places if (found := each.get(key))), ("", None))
    method = entry.get("quant_method") if isinstance(entry, dict) else None
    made = decode(files.infos, _block(entry))
    found = place(convert(made.infos, skeleton), skeleton)
    if not skeleton.state_dict().keys() <= found.keys():  # prefixes may hide what transformers converts
        found = place(convert(found, skeleton), skeleton)
    modules = {name.rpartition(".")[0] for name in found}
    refusal = f"{path}: is quantized already{f' ({method})' if method else ''}"
    for name, wanted in skeleton.state_dict().items():
        info = found.get(name)
        packed = info is not None and wanted.is_floating_point() and not info.dtype.is_floating_point
        bare = isinstance(info, Float8) and entry is not None
        if method == QUANT_METHOD or packed or (entry and info is None and name.rpartition(".")[0] in modules):
            raise PaleyError(f"{refusal}; give the original, full-precision checkpoint")
        if bare:
            raise PaleyError(
                f"{refusal}, and {name} has no scale that it could be decoded with; get the whole checkpoint"
            )
    notes = [f"{count} weights are stored in {kind} and were decoded" for kind, count in made.kinds.items()]
    if made.left_out:
        notes.append(f"scales of inputs and caches are left out: {summed_up(made.left_out)}")
    if entry is not None and not made.kinds:
        notes.append(f"{left} of config.json is left over, as the weights are plain; it is dropped")
    for each in (config, skeleton.config):
        for key in _ENTRIES:
            vars(each).pop(key, None)
    return found, notes


def _block(entry: Any) -> tuple[int, int] | None:
    """Rows and columns of an FP8 block, as an entry of the config has them; None if it does not."""
    sizes = entry.get("weight_block_size") if isinstance(entry, dict) else None
    if not isinstance(sizes, list) or len(sizes) != 2 or not all(type(n) is int and n > 0 for n in sizes):
        return None
    return sizes[0], sizes[1]
