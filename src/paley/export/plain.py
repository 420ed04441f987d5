"""Undoes the format: a quantized folder becomes an ordinary checkpoint that transformers loads without Paley.

Each weight is decoded, and what its layer does to its input at run time goes into it: Q(T x) without rounding is T x,
and W T x = (W T) x. The weights keep the values they were rounded to, and take 16 bits each again.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paley.core.errors import PaleyError, Setting, nearest_name
from paley.core.files import write_atomic
from paley.core.rounding import Quantized
from paley.core.schemes import LinearScheme
from paley.format import spec
from paley.format.checkpoint import Checkpoint
from paley.format.dtypes import FLOATS, cast_to_store
from paley.format.files import copy_companions, write_json
from paley.format.publish import RESULTS, Work
from paley.format.writer import ShardWriter
from paley.model.loading import check_fit, empty_model, read_config

__all__ = ["Plain", "dequantize"]

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
class Plain:
    """Where the ordinary checkpoint is, what it does not do any more, and bytes of all tensors before and after.

    leftover: what is still there of an older output that it replaced, as the system does not delete it.
    """

    output: Path
    dropped: tuple[str, ...]
    quantized_bytes: int
    bytes: int
    leftover: tuple[Path, ...] = ()


@dataclass(frozen=True)
class _Linear:
    """A linear of the quantized folder: its slot, and the width of its input in the model."""

    name: str
    slot: LinearScheme
    in_features: int

    @property
    def stored_width(self) -> int:
        return self.slot.stored_width(self.in_features)


def dequantize(
    path: str | Path,
    *,
    output: str | Path,
    weights_only: bool = False,
    dtype: str | None = None,
    overwrite: bool = False,
    on_tensor: Callable[[int, str], None] = lambda total, name: None,
) -> Plain:
    """Writes the quantized folder `path` as an ordinary checkpoint to the new folder `output`, tensor by tensor.

    weights_only: leave out the rounding of linear inputs, keys and values, which an ordinary checkpoint cannot do.
    dtype: float16, bfloat16 or float32; None: that of the folder's config.json. on_tensor hears of each tensor written,
    and how many there are. Errors: PaleyError, with nothing in `output`.
    """
    folder, output = Path(path), Path(output)
    place = Work(output)
    place.check_apart(folder)
    if place.output.is_relative_to(folder.resolve()):
        raise PaleyError(f"{output}: lies in the model's own folder; choose another --output")
    place.check_free(overwrite=overwrite)
    checkpoint = Checkpoint.open(folder)
    section = spec.quantization_of(checkpoint)
    dropped = _rounded_at_run_time(section)
    if dropped and not weights_only:
        raise PaleyError(
            f"an ordinary checkpoint cannot round what this model rounds as it runs: {'; '.join(dropped)}",
            where=folder,
            remedy=(Setting("weights_only", True), " leaves that out, and keeps the weights"),
        )
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    config["dtype"] = _dtype_name(folder, dtype, config)
    config.pop("torch_dtype", None)  # its older name
    # Softmax does not notice what all scores of a query have in common, so keys need no mean taken off.
    means = {f"{name}.key_mean" for name, slot in section.attentions.items() if slot.keys and slot.center_keys}
    linears = _linears(checkpoint, section, means)
    kept = _kept(checkpoint, linears, means)
    try:
        with place.open(_RUN, overwrite=overwrite) as work:
            new = work.new
            with ShardWriter(new, max_shard_bytes=_SHARD) as writer:
                tensors = _tensors(checkpoint, linears, kept, FLOATS[config["dtype"]], cast=dtype is not None)
                for name, tensor in tensors:
                    writer.add(name, tensor, own=True)
                    on_tensor(len(linears) + len(kept), name)
            write_json(new / "config.json", config)
            copy_companions(folder, new)
            made = Plain(output, tuple(dropped), checkpoint.nbytes, Checkpoint.open(new).nbytes)
            _describe(new, folder, section, config, made)
            return replace(made, leftover=work.publish())
    except OSError as error:
        raise PaleyError(f"{output}: cannot be written: {error.strerror or error}") from error


def _rounded_at_run_time(section: spec.QuantizationConfig) -> list[str]:
    """What is rounded while the model runs, summed up: '14 linear inputs to int4'."""
    found = Counter(f"linear inputs to {slot.input.grid.name}" for slot in section.linears.values() if slot.input)
    for what in ("keys", "values"):
        schemes = (getattr(slot, what) for slot in section.attentions.values())
        found.update(f"layers' cached {what} to {scheme.grid.name}" for scheme in schemes if scheme)
    return [f"{count} {what}" for what, count in found.items()]


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


def _linears(checkpoint: Checkpoint, section: spec.QuantizationConfig, means: set[str]) -> dict[str, _Linear]:
    """The linears to decode, by name; raises where they and the other tensors do not fill the model."""
    model = empty_model(read_config(checkpoint.folder))
    widths = {name: m.in_features for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    found, shapes = {}, {name: info.shape for name, info in checkpoint.infos.items()}
    for name, slot in section.linears.items():
        where = f"{checkpoint.folder}/config.json: {name!r}"
        if name not in widths:
            raise PaleyError(f"{where} is no linear layer of this model{nearest_name(name, widths)}")
        if slot.transform is not None and slot.transform.in_dim != widths[name]:
            raise PaleyError(f"{where}: transform.in_dim={slot.transform.in_dim}, but the layer reads {widths[name]}")
        found[name] = _Linear(name, slot, widths[name])
        taken = [shapes.pop(part) for part in _parts(found[name]) if part in shapes]
        if taken:  # else `check_fit` misses the weight
            shapes[name + spec.WEIGHT] = (*taken[0][:1], widths[name])
    for mean in means:
        shapes.pop(mean, None)
    check_fit(checkpoint.folder, shapes, model)
    return found


def _parts(linear: _Linear) -> list[str]:
    """Names of the tensors that may store a linear's weight."""
    parts = (spec.WEIGHT,) if linear.slot.weight is None else spec.PARTS
    return [linear.name + part for part in parts]


def _kept(checkpoint: Checkpoint, linears: dict[str, _Linear], dropped: set[str]) -> list[str]:
    """Names of the tensors that stay as they are."""
    taken = {part for linear in linears.values() for part in _parts(linear)} | dropped
    return [name for name in checkpoint if name not in taken]


def _tensors(
    checkpoint: Checkpoint, linears: dict[str, _Linear], kept: list[str], dtype: torch.dtype, *, cast: bool
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the ordinary checkpoint, one in memory at a time; cast: also what stays as it is."""
    for linear in linears.values():
        yield linear.name + spec.WEIGHT, _weight(checkpoint, linear, dtype)
    for name in kept:
        tensor = checkpoint.tensor(name)
        yield name, cast_to_store(name, tensor, dtype) if cast else tensor


def _weight(checkpoint: Checkpoint, linear: _Linear, dtype: torch.dtype) -> Tensor:
    """-> [out, in_features]: the stored weight times the transform, in float64, cast once."""
    name, transform = linear.name, linear.slot.transform
    if linear.slot.weight is None:
        stored: Tensor | Quantized = checkpoint.tensor(name + spec.WEIGHT)
        rows = stored.shape[0]
        if stored.shape[1] != linear.stored_width:
            raise PaleyError(f"{name + spec.WEIGHT}: must be {linear.stored_width} wide, got {stored.shape[1]}")
    else:
        stored = spec.decode_linear(name, checkpoint, linear.slot, linear.stored_width)
        rows = stored.codes.shape[0]
    plain = torch.empty(rows, linear.in_features, dtype=dtype)
    step = max(1, _CHUNK // linear.stored_width)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        weight = stored[part] if isinstance(stored, Tensor) else _rows(stored, part).dequantize()
        if transform is not None:
            weight = transform.adjoint(weight.double())
        plain[part] = cast_to_store(name + spec.WEIGHT, weight, dtype)
    return plain


def _rows(q: Quantized, part: slice) -> Quantized:
    zeros, outliers = None if q.zeros is None else q.zeros[part], q.outliers
    if outliers is not None:
        outliers = replace(outliers, codes=outliers.codes[part], scales=outliers.scales[part])
    return replace(q, codes=q.codes[part], scales=q.scales[part], zeros=zeros, outliers=outliers)


def _describe(work: Path, folder: Path, section: spec.QuantizationConfig, config: dict[str, Any], made: Plain) -> None:
    """results.json and the card: where this checkpoint came from. plan.json says which texts the model was tuned on."""
    grids = Counter("16 bits" if slot.weight is None else slot.weight.grid.name for slot in section.linears.values())
    about = {"quantized_bytes": made.quantized_bytes, "bytes": made.bytes, "dropped": list(made.dropped)}
    write_json(work / RESULTS, {"run": _RUN, "from": folder.resolve().name, **about})
    card = _CARD.format(
        model_type=config.get("model_type"), folder=folder.resolve().name, dtype=config["dtype"], size=made.bytes,
        grids=", ".join(f"{grid} × {count}" for grid, count in grids.items()), quantized_size=made.quantized_bytes,
        dropped=_DROPPED.format(dropped="; ".join(made.dropped)) if made.dropped else "",
    )  # fmt: skip
    write_atomic(work / "README.md", card)
    if (plan := folder / "plan.json").is_file():
        shutil.copyfile(plan, work / "plan.json")
