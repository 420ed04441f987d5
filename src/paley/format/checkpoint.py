"""Checkpoint folders: any Hugging Face model in safetensors, checked when opened, read tensor by tensor."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paley.core.errors import PaleyError, nearest_name
from paley.core.reading import read_json
from paley.format.gguf import GgufFile
from paley.format.header import TensorInfo, as_bytes, read_header
from paley.format.writer import INDEX, SINGLE

__all__ = ["GGUF_FILE", "Checkpoint", "read_tensors", "refuse_adapter"]

GGUF_FILE = "source.paley.gguf"  # a link to one, in a folder that `model.gguf_source` has made for it

# Keys of config.json that do not change the model: tensors have their own dtype.
VOLATILE = {"transformers_version", "_name_or_path", "torch_dtype", "dtype"}
_CHUNK = 2**24  # elements checked at a time
_SHARD = re.compile(r"[^/\\:\0]+\.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class Checkpoint:
    """`config`: config.json; `infos`: name -> dtype, shape and place of each tensor, sorted by name."""

    def __init__(self, folder: Path, config: dict[str, Any], infos: dict[str, TensorInfo]):
        self.folder, self.config = folder, config
        self.infos = dict(sorted(infos.items()))

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Reads and checks config.json, the index and every header; PaleyError names the file at fault."""
        folder = Path(folder)
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "no such folder"
            raise PaleyError(f"{folder}: {what}; give the folder of a Hugging Face checkpoint")
        refuse_adapter(folder)
        if not (folder / "config.json").is_file():
            raise PaleyError(f"{folder}: no config.json here; give the folder of a Hugging Face checkpoint")
        config = _read(folder / "config.json")
        return cls(folder, config, _find_tensors(folder, config))

    @property
    def names(self) -> list[str]:
        """All tensors, sorted."""
        return list(self.infos)

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(info.nbytes for info in self.infos.values())

    @property
    def float_dtype(self) -> torch.dtype:
        """The type that holds every float tensor without loss: their own 16 bits if they have one, else float32."""
        floats = {info.dtype for info in self.infos.values() if info.dtype.is_floating_point}
        return floats.pop() if len(floats) == 1 and floats <= {torch.bfloat16, torch.float16} else torch.float32

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of a tensor; PaleyError for a name that is not there."""
        if name not in self.infos:
            raise PaleyError(f"{self.folder}: no tensor {name!r}{nearest_name(name, self.infos)}")
        return self.infos[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.info(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self.info(name).dtype

    def tensor(self, name: str) -> Tensor:
        """Reads a tensor into its own memory."""
        return self.info(name).read()

    __getitem__ = tensor

    def __contains__(self, name: object) -> bool:
        return name in self.infos

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor), by name, one in memory at a time."""
        for name in self.infos:
            yield name, self.tensor(name)

    def fingerprint(self, *, check_finite: bool = False) -> str:
        """sha256, in hex, of tensors and config, independent of how they are split into files.

        check_finite: PaleyError names the first tensor with a NaN or infinity, found in the same pass.
        """
        digest = hashlib.sha256(_canonical(_lasting(self.config)))
        for name, tensor in self.items():
            if check_finite and tensor.is_floating_point() and (bad := first_not_finite(tensor)) is not None:
                index, value = bad
                raise PaleyError(
                    f"{self.info(name).file}: {name} holds {value} at {list(index)}; the checkpoint is damaged, "
                    "get a sound copy of it"
                )
            digest.update(_canonical([name, str(tensor.dtype), list(tensor.shape)]))
            digest.update(as_bytes(tensor))
        return digest.hexdigest()


def refuse_adapter(folder: Path) -> None:
    """Raises for a folder with an adapter alone."""
    whole = (folder / SINGLE).is_file() or (folder / INDEX).is_file()
    if (folder / "adapter_config.json").is_file() and not whole:
        raise PaleyError(
            f"{folder}: is an adapter (LoRA), not a model; merge it first, with peft: "
            "AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload().save_pretrained(NEW_FOLDER)"
        )


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file, checked before use; PaleyError if it is damaged."""
    return {name: info.read() for name, info in read_header(Path(path)).items()}


def first_not_finite(tensor: Tensor) -> tuple[tuple[int, ...], float] | None:
    """(index, value) of the first NaN or infinity in a float tensor."""
    if tensor.numel() == 0:
        return None
    start = 0
    for part in tensor.reshape(-1).split(_CHUNK):
        part = part.float() if part.dtype.itemsize == 1 else part  # float8 has no arithmetic
        # If any element is NaN, the extremes are NaN. Finding them is ten times faster than testing every element.
        if not torch.stack(part.aminmax()).isfinite().all():
            offset = int(part.isfinite().logical_not().int().argmax())
            index = torch.unravel_index(torch.tensor(start + offset), tensor.shape)
            return tuple(int(i) for i in index), float(part[offset])
        start += len(part)
    return None


def _lasting(config: Any) -> Any:
    """config without its volatile keys, at every depth."""
    if isinstance(config, dict):
        return {key: _lasting(value) for key, value in config.items() if key not in VOLATILE}
    return [_lasting(value) for value in config] if isinstance(config, list) else config


def _canonical(obj: Any) -> bytes:
    return json.dumps(obj, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def _find_tensors(folder: Path, config: dict[str, Any]) -> dict[str, TensorInfo]:
    """All tensors of the folder, from model.safetensors or from the shards in the index; or from a GGUF file."""
    single, index = folder / SINGLE, folder / INDEX
    if (folder / GGUF_FILE).exists():
        return GgufFile.open((folder / GGUF_FILE).resolve()).named(config)
    if single.is_file() and index.is_file():
        raise PaleyError(f"{folder}: holds both {SINGLE} and {INDEX}; remove the one that is out of date")
    if single.is_file():
        return read_header(single)
    if not index.is_file():
        raise PaleyError(f"{folder}: {_why_no_weights(folder)}")
    shards: dict[str, list[str]] = {}
    for name, file in _weight_map(index).items():
        shards.setdefault(file, []).append(name)
    infos: dict[str, TensorInfo] = {}
    for file, names in shards.items():
        infos |= _read_shard(folder / file, set(names))
    return infos


def _read_shard(file: Path, promised: set[str]) -> dict[str, TensorInfo]:
    """The tensors of a shard, which are those that the index promises, no less and no more."""
    if not file.is_file():
        raise PaleyError(f"{file}: is missing, though {INDEX} names it; copy or download it")
    infos = read_header(file)
    if missing := sorted(promised - infos.keys()):
        hint = nearest_name(missing[0], infos)
        raise PaleyError(f"{file}: tensor {missing[0]!r} is missing, though {INDEX} promises it{hint}")
    if extra := sorted(infos.keys() - promised):
        raise PaleyError(
            f"{file}: tensor {extra[0]!r} is not in {INDEX} for this file; "
            "load and save the model with transformers to make a new index"
        )
    return infos


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> name of a file in the folder."""
    files = _read(index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise PaleyError(f"{index}: must have a 'weight_map' of tensors to files; copy or download it again")
    for name, file in files.items():
        if not isinstance(file, str) or not _SHARD.fullmatch(file):
            raise PaleyError(
                f"{index}: {name!r} is said to be in {file!r}; only safetensors files of the same folder are opened"
            )
    return files


def _read(file: Path) -> dict[str, Any]:
    try:
        return read_json(file)
    except PaleyError as error:
        raise PaleyError(f"{error}; copy or download it again") from None


def _why_no_weights(folder: Path) -> str:
    if any(folder.glob("model-*-of-*.safetensors")):
        return f"holds shards, but no {INDEX}: the copying or writing was cut short; do it again"
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        return (
            f"the weights are pickled ({pickles[0]}), and opening a pickle can run any code; if you trust "
            "them, convert them to safetensors with transformers: "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    return f"no {SINGLE} and no {INDEX} here; give the folder of a Hugging Face checkpoint"
