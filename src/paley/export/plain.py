"""Undoes the format: a quantized folder becomes an ordinary checkpoint that transformers loads without Paley.

Each weight is decoded, and what its layer does to its input at run time goes into it: Q(T x) without rounding is T x,
and W T x = (W T) x. The weights keep the values they were rounded to, and take 16 bits each again. A tied pair stays
tied, unless the residual stream turns between its two sides: embedding and head get a matrix each then.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paley.arch import Architecture, Site
from paley.core.errors import PaleyError, Setting, nearest_name
from paley.core.files import write_atomic
from paley.core.rounding import Quantized
from paley.core.schemes import LinearScheme
from paley.core.transforms import Transform
from paley.export.folder import Exported, QuantizedFolder, place_for
from paley.format import digests, spec
from paley.format.checkpoint import Checkpoint
from paley.format.dtypes import FLOATS, cast_to_store
from paley.format.files import copy_companions, write_json
from paley.format.publish import RESULTS
from paley.format.rope import with_older_keys
from paley.format.writer import ShardWriter
from paley.model.keys import MEAN_KEYS
from paley.model.loading import check_fit, empty_model, join_tie, read_config
from paley.model.walk import sites_of

__all__ = ["dequantize"]

_CHUNK = 2**22  # values decoded together
_SHARD = 2**28  # bytes; a shard is in memory while it fills
_RUN = "dequantize"

_CARD = """\
---
library_name: transformers
tags: [paley]
---

# A {model_type} model, decoded from a quantized one

`paley dequantize` made this ordinary checkpoint from the quantized folder `{folder}`, and any tool that reads
safetensors loads it. Its weights have the values that they were quantized to ({grids}), decoded to {dtype}; they
take {size:,} bytes, the quantized folder {quantized_size:,}.
{dropped}"""

_DROPPED = """
What the quantized model does beside is not done here, so this one predicts differently. Dropped: {dropped}.
"""


@dataclass(frozen=True)
class _Weight:
    """A weight of the quantized folder, and its width in the model before the residual stream is turned."""

    name: str
    scheme: LinearScheme
    width: int
    site: Site

    @property
    def tensor(self) -> str:
        """The name of the decoded weight in an ordinary checkpoint."""
        return self.site.tensor

    def restored(self, rows: Tensor) -> Tensor:
        """[rows, columns] -> as the model holds it: a stack of experts, or turned around."""
        stack = rows.unflatten(0, (self.site.experts, -1)) if self.site.experts else rows
        return stack.mT.contiguous() if self.site.transposed else stack

    @property
    def stored_width(self) -> int:
        return self.scheme.stored_width(self.width)

    @property
    def parts(self) -> list[str]:
        """Names of the tensors that may store it."""
        if self.scheme == LinearScheme():
            return [self.tensor]
        return [self.name + part for part in ((spec.WEIGHT,) if self.scheme.weight is None else spec.PARTS)]


@dataclass(frozen=True)
class _Layout:
    """Which tensors are decoded, which stay as they are, and how the residual stream of a tied pair turns.

    carried: those that no module of the model reads.
    """

    row: Architecture
    weights: dict[str, _Weight]
    kept: list[str]
    carried: tuple[str, ...]
    stream: Transform | None

    @property
    def tensors(self) -> int:
        """How many the ordinary checkpoint has."""
        untied = 0 if self.stream is None else 2  # the head and the final norm
        return len(self.weights) + len(self.kept) + len(self.carried) + untied


def dequantize(
    path: str | Path,
    *,
    output: str | Path,
    weights_only: bool = False,
    dtype: str | None = None,
    overwrite: bool = False,
    on_tensor: Callable[[int, str], None] = lambda total, name: None,
) -> Exported:
    """Writes the quantized folder `path` as an ordinary checkpoint to the new folder `output`, tensor by tensor.

    weights_only: leave out what an ordinary checkpoint cannot do: the rounding of linear inputs, keys and values, and
    the final norm's projection of a stream that a tied model has widened.
    dtype: float16, bfloat16 or float32; None: that of the folder's config.json. on_tensor hears of each tensor written,
    and how many there are. Errors: PaleyError, with nothing in `output`.
    """
    folder, output = Path(path), Path(output)
    place = place_for(output, folder, overwrite=overwrite)
    source = QuantizedFolder.open(folder, weights_only=weights_only, what="an ordinary checkpoint")
    stored, section = source.stored, source.section
    config = {key: value for key, value in stored.config.items() if key != "quantization_config"}
    config = with_older_keys(config)
    config["dtype"] = _dtype_name(folder, dtype, config)
    config.pop("torch_dtype", None)  # its older name
    if section.stream is not None:
        config["tie_word_embeddings"] = False
    # Softmax does not notice what all scores of a query have in common, so keys need no mean taken off.
    means = {f"{name}.{part}" for name, slot in section.attentions.items() if slot.needs_data for part in MEAN_KEYS}
    model_config = read_config(folder)
    checkpoint = join_tie(folder, stored, sites_of(empty_model(model_config)))
    layout = _layout(checkpoint, section, model_config, means)
    try:
        with place.open(_RUN, overwrite=overwrite) as work:
            new = work.new
            with ShardWriter(new, max_shard_bytes=_SHARD) as writer:
                for name, tensor in _tensors(checkpoint, layout, FLOATS[config["dtype"]], cast=dtype is not None):
                    writer.add(name, tensor, own=True)
                    on_tensor(layout.tensors, name)
            write_json(new / "config.json", config)
            copy_companions(folder, new)
            digests.seal_model(new)
            made = Exported(output, source.dropped, stored.nbytes, Checkpoint.open(new).nbytes)
            _describe(new, source, config, made)
            digests.seal(new)
            return replace(made, leftover=work.publish())
    except OSError as error:
        raise PaleyError(f"{output}: cannot be written: {error.strerror or error}") from error


def _dtype_name(folder: Path, asked: str | None, config: dict[str, Any]) -> str:
    name = asked or config.get("dtype") or config.get("torch_dtype")
    if name not in FLOATS:
        where = "dtype" if asked else f"{folder}/config.json: dtype"
        raise PaleyError(
            f"must be {', '.join(FLOATS)}",
            where=where,
            got=repr(name),
            remedy=(Setting("dtype"), " says which to write"),
        )
    return name


def _layout(checkpoint: Checkpoint, section: spec.QuantizationConfig, config: Any, dropped: set[str]) -> _Layout:
    """What the ordinary checkpoint is made of; raises where the folder's tensors do not fill the model."""
    stream, shapes = section.stream, {n: i.shape for n, i in checkpoint.infos.items()}
    if stream is not None:
        config.tie_word_embeddings = False
    model, schemes = empty_model(config), section.linears
    sites = sites_of(model)
    row = sites.architecture
    widths = {site.name: site.shape[1] for site in sites.of("embedding", "linear", "head")}
    if stream is not None:
        _check_stream(checkpoint, row, stream, widths[row.embedding])
        schemes = {row.embedding: LinearScheme()} | schemes
        widths[row.embedding] = stream.in_dim
    weights: dict[str, _Weight] = {}
    for name, scheme in schemes.items():
        where = f"{checkpoint.folder}/config.json: {name!r}"
        if name not in widths:
            raise PaleyError(f"{where} is no linear layer of this model{nearest_name(name, widths)}")
        if scheme.transform is not None and scheme.transform.in_dim != widths[name]:
            raise PaleyError(f"{where}: transform.in_dim={scheme.transform.in_dim}, but the layer reads {widths[name]}")
        weights[name] = _Weight(name, scheme, widths[name], sites[name])
        shapes.pop(name + spec.DIAGONAL, None)
        taken = [shapes.pop(part) for part in weights[name].parts if part in shapes]
        if taken and scheme == LinearScheme():
            shapes[weights[name].tensor] = taken[0]
        elif taken:  # else `check_fit` misses the weight
            rows = torch.empty(taken[0][0], widths[name], device="meta")
            if sites[name].experts and len(rows) % sites[name].experts:
                raise PaleyError(f"{where}: {len(rows)} rows are not those of {sites[name].experts} experts")
            shapes[weights[name].tensor] = tuple(weights[name].restored(rows).shape)
    for name in (*dropped, *section.carried):
        shapes.pop(name, None)
    coded = [weight for weight in weights.values() if weight.scheme != LinearScheme()]
    weights = {weight.name: weight for weight in coded} | (
        {row.embedding: weights[row.embedding]} if stream is not None else {}
    )
    taken = {part for weight in weights.values() for part in (*weight.parts, weight.name + spec.DIAGONAL)} | dropped
    if stream is not None and (rows := shapes.get(row.embedding + spec.WEIGHT)) is not None:
        shapes |= {name + spec.WEIGHT: (rows[0], stream.out_dim) for name in (row.embedding, row.head)}
        shapes[row.norm + spec.WEIGHT] = (stream.out_dim,)
        taken.add(row.norm + spec.WEIGHT)
    check_fit(checkpoint.folder, shapes, model)
    taken |= {*section.carried}
    return _Layout(row, weights, [name for name in checkpoint if name not in taken], section.carried, stream)


def _check_stream(checkpoint: Checkpoint, row: Architecture, stream: Transform, hidden: int) -> None:
    """Raises unless the turned stream is as wide as the model's, and the final norm as wide as the embedding's rows."""
    where, norm = f"{checkpoint.folder}/config.json: stream", row.norm + spec.WEIGHT
    if stream.out_dim != hidden:
        raise PaleyError(f"{where} ends at {stream.out_dim} values, but hidden_size is {hidden}")
    if norm in checkpoint and checkpoint.shape(norm) != (stream.in_dim,):
        raise PaleyError(f"{norm}: must have {stream.in_dim} values, got {list(checkpoint.shape(norm))}")


def _tensors(
    checkpoint: Checkpoint, layout: _Layout, dtype: torch.dtype, *, cast: bool
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the ordinary checkpoint, one in memory at a time; cast: also what stays as it is."""
    for name, weight in layout.weights.items():
        if layout.stream is not None and name == layout.row.embedding:
            yield from _untied(checkpoint, layout.row, weight, layout.stream, dtype)
        else:
            yield weight.tensor, weight.restored(_decode(checkpoint, weight, weight.width, dtype))
    for name in layout.kept:
        tensor = checkpoint.tensor(name)
        yield name, cast_to_store(name, tensor, dtype) if cast else tensor
    yield from ((name, checkpoint.tensor(name)) for name in layout.carried)


def _untied(
    checkpoint: Checkpoint, row: Architecture, embedding: _Weight, stream: Transform, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Embedding, head and final norm of a pair between which the stream turns: the head's side takes gain and turn."""
    gain = checkpoint.tensor(row.norm + spec.WEIGHT).double() + row.gain_offset
    shrink = math.sqrt(stream.in_dim / stream.out_dim)  # see `fold._rotate_stream_`
    grown = row.scale_at(stream.in_dim) / row.scale_at(stream.out_dim)
    sides = {
        row.embedding: lambda rows: stream.apply(rows) * grown,
        row.head: lambda rows: stream.apply(rows * gain) * shrink,
    }
    for name, change in sides.items():
        yield name + spec.WEIGHT, _decode(checkpoint, embedding, stream.out_dim, dtype, change)
    yield row.norm + spec.WEIGHT, torch.full((stream.out_dim,), 1 - row.gain_offset, dtype=dtype)


def _decode(
    checkpoint: Checkpoint, weight: _Weight, width: int, dtype: torch.dtype,
    change: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> Tensor:  # fmt: skip
    """-> [rows, width]: the stored weight times its transform, then changed, in float64, cast once."""
    name, transform = weight.name, weight.scheme.transform
    diagonal = checkpoint.tensor(name + spec.DIAGONAL).double() if weight.scheme.diagonal else None
    if weight.scheme.weight is None:
        stored: Tensor | Quantized = checkpoint.tensor(name + spec.WEIGHT)
        count = stored.shape[0]
        if stored.shape[1] != weight.stored_width:
            raise PaleyError(f"{name + spec.WEIGHT}: must be {weight.stored_width} wide, got {stored.shape[1]}")
    else:
        stored = spec.decode_linear(name, checkpoint, weight.scheme, weight.stored_width)
        count = stored.codes.shape[0]
    plain = torch.empty(count, width, dtype=dtype)
    step = max(1, _CHUNK // weight.stored_width)
    for start in range(0, count, step):
        part = slice(start, start + step)
        rows = (stored[part] if isinstance(stored, Tensor) else _rows(stored, part).dequantize()).double()
        if transform is not None:
            rows = transform.adjoint(rows)
        if diagonal is not None:
            rows = rows / diagonal
        plain[part] = cast_to_store(name + spec.WEIGHT, change(rows), dtype)
    return plain


def _rows(q: Quantized, part: slice) -> Quantized:
    zeros, outliers = None if q.zeros is None else q.zeros[part], q.outliers
    if outliers is not None:
        outliers = replace(outliers, codes=outliers.codes[part], scales=outliers.scales[part])
    return replace(q, codes=q.codes[part], scales=q.scales[part], zeros=zeros, outliers=outliers)


def _describe(work: Path, source: QuantizedFolder, config: dict[str, Any], made: Exported) -> None:
    """results.json and the card: where this checkpoint came from. plan.json says which texts the model was tuned on."""
    folder = source.path
    about = {"quantized_bytes": made.quantized_bytes, "bytes": made.bytes, "dropped": list(made.dropped)}
    write_json(work / RESULTS, {"run": _RUN, "from": folder.resolve().name, **about})
    card = _CARD.format(
        model_type=config.get("model_type"), folder=folder.resolve().name, dtype=config["dtype"], size=made.bytes,
        grids=source.grids, quantized_size=made.quantized_bytes,
        dropped=_DROPPED.format(dropped="; ".join(made.dropped)) if made.dropped else "",
    )  # fmt: skip
    write_atomic(work / "README.md", card)
    if (plan := folder / "plan.json").is_file():
        shutil.copyfile(plan, work / "plan.json")
