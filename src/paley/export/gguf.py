"""A quantized folder as a GGUF file, which llama.cpp reads: the very codes and scales, in ggml's types of blocks.

Nothing is rounded a second time. A grid that no type holds, and what turns at run time, is refused before any work;
the presets `gguf-q4_0` to `gguf-q8_0` make folders that fit. If a type is asked for, any folder is decoded and its
weights are rounded anew (`gguf_refit.py`). The `gguf` package writes the file (`paley[gguf]`).
"""

from __future__ import annotations

import importlib
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paley.arch import Site, Sites
from paley.arch.gguf import ROPE_FACTORS
from paley.core.errors import PaleyError, Setting
from paley.core.files import disk, write_atomic
from paley.core.schemes import LinearScheme
from paley.export.blocks import BLOCK, BlockType, fitting, pack
from paley.export.folder import Exported, QuantizedFolder, place_for
from paley.export.gguf_model import GgufModel
from paley.export.gguf_refit import Refit, WrittenTensor, check_kind, decoded
from paley.export.gguf_tokenizer import tokenizer_keys
from paley.format import spec
from paley.format.checkpoint import Checkpoint
from paley.format.files import write_json
from paley.format.publish import RESULTS
from paley.model.keys import MEAN_KEYS
from paley.model.loading import join_tie, read_config

__all__ = ["export_gguf"]

_RUN = "export gguf"
_AT_ONCE = 2**22  # values packed together
_FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_FILE_TYPES = {"Q4_K": "Q4_K_S"}  # where the file's type has another name than its tensors'
_WAY_OUT = "quantize with a preset that GGUF holds, such as --preset gguf-q4_0, or export it --to plain"

_CARD = """\
---
tags: [paley, gguf]
---

# A {model_type} model in GGUF

`paley export` made `{file}` from the quantized folder `{folder}`; llama.cpp and whatever is built on it read it. Its
weights are {how} that folder ({grids}), as {types}; {size:,} bytes of tensors.
{notes}"""


def export_gguf(
    path: str | Path,
    *,
    output: str | Path,
    kind: str | None = None,
    weights_only: bool = False,
    overwrite: bool = False,
    on_tensor: Callable[[int, str], None] = lambda total, name: None,
) -> Exported:
    """Writes the quantized folder `path` as `model-TYPE.gguf` in the new folder `output`, with a model card.

    kind: Q4_K, Q6_K or Q8_0, to which weights are rounded anew, whatever they are on. weights_only: leave out the
    rounding of linear inputs, keys and values, which llama.cpp has settings of its own for.
    on_tensor hears of each tensor written, and how many there are. Errors: PaleyError, with nothing in `output`.
    """
    package = _package()
    folder, output = Path(path), Path(output)
    place = place_for(output, folder, overwrite=overwrite)
    source = QuantizedFolder.open(folder, weights_only=weights_only, what="a GGUF file")
    if kind is not None:
        check_kind(kind)
    config = read_config(folder)
    model, refit = GgufModel.of(config, f"{folder}/config.json"), None if kind is None else Refit(package, kind)
    if refit is not None:
        refit.check(model.sites)
    _check_carried(source)
    tokenizer = tokenizer_keys(folder, config.vocab_size)
    try:
        with place.open(_RUN, overwrite=overwrite) as work:
            plain = folder if kind is None else decoded(folder, work.path / "plain", weights_only=weights_only)
            config = read_config(plain)
            model = GgufModel.of(config, f"{folder}/config.json")
            checkpoint = join_tie(folder, source.stored if kind is None else Checkpoint.open(plain), model.sites)
            names = package.get_tensor_name_map(_architecture(package, model), config.num_hidden_layers)
            kinds = _kinds(source, checkpoint, model.sites) if kind is None else {}
            tensors = list(_tensors(source, checkpoint, model, kinds, names, refit))
            label = kind or _label(kinds)
            file = work.new / f"model-{label}.gguf"
            work.new.mkdir()
            with disk(file, sum(tensor.nbytes for tensor in tensors)):
                writer = package.GGUFWriter(file, model.family.architecture)
                _add_keys(package, writer, model, tokenizer, label, folder.resolve().name)
                _write(package, writer, tensors, on_tensor)
            made = _exported(output, source, tensors, kinds, refit)
            _describe(work.new, file.name, source, config, made, kind)
            return replace(made, leftover=work.publish())
    except OSError as error:
        raise PaleyError(f"{output}: cannot be written: {error.strerror or error}") from error


def _package() -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise PaleyError(f"the package gguf is missing ({error})", remedy='pip install "paley[gguf]"') from None


def _architecture(package: Any, model: GgufModel) -> Any:
    return next(arch for arch, name in package.MODEL_ARCH_NAMES.items() if name == model.family.architecture)


def _check_carried(source: QuantizedFolder) -> None:
    if source.section.carried:
        raise PaleyError(f"it carries {source.section.carried[0]!r}, which GGUF has no name for", where=source.path,
                         remedy="quantize with extra_tensors=drop")  # fmt: skip


def _kinds(source: QuantizedFolder, checkpoint: Checkpoint, model: Sites) -> dict[str, BlockType]:
    """ggml's type of each coded weight; raises for the first that GGUF cannot hold."""
    if source.section.stream is not None:
        raise PaleyError("its residual stream turns at run time, which GGUF cannot say", where=source.path,
                         remedy=_WAY_OUT)  # fmt: skip
    found: dict[str, BlockType] = {}
    for name, scheme in source.section.linears.items():
        where = f"{source.path}: {name}"
        if name not in model:
            raise PaleyError("is no weight of this model", where=where)
        if (problem := _why_not(scheme)) is not None:
            raise PaleyError(problem, where=where, remedy=_WAY_OUT)
        if scheme.weight is None:
            continue
        grid, width = scheme.weight.grid, model[name].shape[1]
        group = scheme.weight.group_size or width
        if group % BLOCK:
            raise PaleyError(f"GGUF needs groups of a multiple of {BLOCK} columns", where=where,
                             got=f"group_size={group}", remedy=_WAY_OUT)  # fmt: skip
        zeros = checkpoint.tensor(name + spec.ZEROS) if grid.affine else None
        if (kind := fitting(grid, zeros)) is None:
            raise PaleyError(f"no type of GGUF holds grid {grid.name!r}; the nearest are {_nearest(grid)}", where=where,
                             remedy=_WAY_OUT)  # fmt: skip
        found[name] = kind
    return found


def _why_not(scheme: LinearScheme) -> str | None:
    """What of a scheme GGUF cannot hold."""
    if scheme.transform is not None:
        return "its input turns at run time, which GGUF cannot say"
    if scheme.outliers:
        return f"{scheme.outliers} of its columns have a grid of their own, which GGUF cannot say"
    return None


def _nearest(grid: Any) -> str:
    bits = min(8, max(4, round(grid.bits)))
    return "int8" if bits > 5 else f"int{bits} and uint{bits}"


def _tensors(
    source: QuantizedFolder,
    checkpoint: Checkpoint,
    model: GgufModel,
    kinds: dict[str, BlockType],
    names: Any,
    refit: Refit | None,
) -> Iterator[WrittenTensor]:
    """What the file holds, in the order of the checkpoint's names; raises for a tensor that GGUF has no place for."""
    if (factors := model.rope_factors()) is not None:
        yield WrittenTensor(ROPE_FACTORS, tuple(factors.shape), "F32", lambda: _bytes(factors), factors.nbytes)
    taken = {f"{attention}.{part}" for attention in source.section.attentions for part in MEAN_KEYS}
    for name, kind in kinds.items():
        taken |= {name + part for part in spec.PARTS}
        site, rows = model.sites[name], checkpoint.shape(name + spec.CODES)[0]
        if rows != site.shape[0]:
            raise PaleyError(f"{name}: has {rows} rows, but the model's layer has {site.shape[0]}")
        parts = model.stacks(site) if site.experts else {name: model.row_order(site)}
        for part, order in parts.items():
            count = site.shape[0] if order is None else len(order)
            shape = (site.experts, count // site.experts, site.shape[1]) if site.experts else (count, site.shape[1])
            yield WrittenTensor(
                _name(names, part + spec.WEIGHT), shape, kind.name,
                partial(_coded, checkpoint, source.section.linears[name], site, kind, order),
                math.prod(shape) // BLOCK * kind.block_bytes,
            )  # fmt: skip
    for name in checkpoint:
        if name in taken:
            continue
        site = model.sites.get(name.removesuffix(spec.BIAS).removesuffix(spec.WEIGHT))
        if name.endswith(spec.BIAS) and (site is None or site.writes not in model.family.biased):
            raise PaleyError(f"{name}: GGUF has no place for this bias in a model of this family", remedy=_WAY_OUT)
        if refit is not None and site is not None and (site.experts or name.endswith(spec.WEIGHT)):
            for part, order in (model.stacks(site) if site.experts else {site.name: model.row_order(site)}).items():
                read = partial(_rows, checkpoint, name)
                yield refit.tensor(_name(names, part + spec.WEIGHT), part, site, read, order)
            continue
        if site is not None and site.experts:
            raise PaleyError(
                f"{name}: stacks of experts are written to GGUF from their codes, and this one has none",
                remedy=("quantize it by a preset such as gguf-q4_0, or set ", Setting("kind", "Q4_K")),
            )
        vector = len(checkpoint.shape(name)) == 1
        kind = torch.float32 if vector or site is None else checkpoint.dtype(name)  # None: also a router
        if kind not in _FLOATS:
            raise PaleyError(f"{name}: must be {', '.join(_FLOATS.values())}", got=str(kind), remedy=_WAY_OUT)
        count = math.prod(checkpoint.shape(name))
        yield WrittenTensor(
            _name(names, name), checkpoint.shape(name), _FLOATS[kind],
            partial(_plain, checkpoint, name, site, model), count * kind.itemsize,
        )  # fmt: skip


def _rows(checkpoint: Checkpoint, name: str) -> Tensor:
    """A weight [rows, columns]; of a stack the rows of one expert after the other."""
    return checkpoint.tensor(name).flatten(0, -2)


def _plain(checkpoint: Checkpoint, name: str, site: Site | None, model: GgufModel) -> Tensor:
    """The bytes of an unquantized tensor: norms as gains in float32, rows in the order of the file's RoPE."""
    tensor = checkpoint.tensor(name)
    if site is None:
        tensor = tensor.float() + model.row.gain_offset
    elif (order := model.row_order(site)) is not None:
        tensor = tensor[order]
    return _bytes(tensor.float() if tensor.ndim == 1 else tensor)


def _name(names: Any, ours: str) -> str:
    if (found := names.get_name(ours, try_suffixes=(spec.WEIGHT, spec.BIAS))) is None:
        raise PaleyError(f"{ours}: GGUF has no name for this tensor in a model of this family", remedy=_WAY_OUT)
    return found


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def _coded(
    checkpoint: Checkpoint, scheme: LinearScheme, site: Site, kind: BlockType, order: Tensor | None
) -> Tensor:  # fmt: skip
    """The bytes of a coded weight, made a few rows at a time."""
    q = spec.decode_linear(site.name, checkpoint, scheme, site.shape[1])
    rows = torch.arange(len(q.codes)) if order is None else order
    parts = []
    for some in rows.split(max(1, _AT_ONCE // q.width)):
        zeros = None if q.zeros is None else q.zeros[some]
        parts.append(pack(replace(q, codes=q.codes[some], scales=q.scales[some], zeros=zeros), kind))
    return torch.cat(parts)


def _label(kinds: dict[str, BlockType]) -> str:
    """The type that most weights have."""
    found = Counter(kind.name for kind in kinds.values())
    return found.most_common(1)[0][0] if found else "F16"


def _add_keys(package: Any, writer: Any, model: GgufModel, tokenizer: dict[str, Any], label: str, name: str) -> None:
    kinds = package.GGUFValueType
    own: dict[str, Any] = {**model.keys(), **model.scaling()}
    general: dict[str, Any] = {"general.type": "model", "general.name": name, "general.quantized_by": "paley"}
    general["general.quantization_version"] = 2
    types = package.LlamaFileType
    general["general.file_type"] = int(getattr(types, f"MOSTLY_{_FILE_TYPES.get(label, label)}", types.GUESSED))
    named = {f"{model.family.architecture}.{key}": value for key, value in own.items()}
    named |= {f"tokenizer.{key}": value for key, value in tokenizer.items()}
    for key, value in (general | named).items():
        first = value[0] if isinstance(value, list) else value
        kind = {str: kinds.STRING, bool: kinds.BOOL, float: kinds.FLOAT32, int: kinds.UINT32}[type(first)]
        if isinstance(value, list):
            kind = kinds.INT32 if kind == kinds.UINT32 else kind
            writer.add_key_value(key, value, kinds.ARRAY, kind)
        else:
            writer.add_key_value(key, value, kind)


def _write(package: Any, writer: Any, tensors: list[WrittenTensor], on_tensor: Callable[[int, str], None]) -> None:
    """The file, one tensor in memory at a time."""
    for tensor in tensors:
        kind = getattr(package.GGMLQuantizationType, tensor.kind)
        writer.add_tensor_info(tensor.name, tensor.shape, _NO_NUMPY_TYPE, tensor.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.data().numpy())
        on_tensor(len(tensors), tensor.name)
    for file in writer.fout:
        file.flush()
        os.fsync(file.fileno())
    writer.close()


_NO_NUMPY_TYPE: Any = None  # the package looks at it only where no type of ggml's is given


def _exported(
    output: Path,
    source: QuantizedFolder,
    tensors: list[WrittenTensor],
    kinds: dict[str, BlockType],
    refit: Refit | None,
) -> Exported:
    types = Counter(tensor.kind for tensor in tensors)
    notes = [] if refit is None else refit.notes()
    if offset := sum(kind.zero is None for kind in kinds.values()):
        notes.append(f"offsets of {offset} weights are rounded to float16: by at most 2^-11 of an offset")
    size = sum(tensor.nbytes for tensor in tensors)
    return Exported(
        output, source.dropped, source.stored.nbytes, size, types=dict(types.most_common()), notes=tuple(notes)
    )


def _describe(work: Path, file: str, source: QuantizedFolder, config: Any, made: Exported, kind: str | None) -> None:
    """results.json and the card: where this file came from."""
    about = {"quantized_bytes": made.quantized_bytes, "bytes": made.bytes, "dropped": list(made.dropped)}
    about |= {"types": made.types, "notes": list(made.notes)}
    folder = source.path.resolve().name
    write_json(work / RESULTS, {"run": _RUN, "from": folder, **about})
    notes = [f"Left out: {what}." for what in made.dropped] + [f"Not exact: {what}." for what in made.notes]
    card = _CARD.format(
        model_type=config.model_type, file=file, folder=folder, grids=source.grids, size=made.bytes,
        how="the very codes of" if kind is None else "rounded anew from what is decoded of",
        types=", ".join(f"{kind} × {count}" for kind, count in made.types.items()),
        notes="".join(f"\n{note}\n" for note in notes),
    )  # fmt: skip
    write_atomic(work / "README.md", card)
