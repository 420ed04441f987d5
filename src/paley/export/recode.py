"""A quantized folder as another tool's safetensors folder: names and scales change, packed codes stay as they are.

compressed-tensors and MLX store codes as Paley does, a dense stream of bits, least significant first, in words of 32.
What differs between them is a `Recoding`.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from paley.arch import Site
from paley.core.errors import PaleyError
from paley.core.files import write_atomic
from paley.core.grids import Grid
from paley.core.schemes import LinearScheme, WeightScheme
from paley.export.folder import Exported, QuantizedFolder, place_for
from paley.format import spec
from paley.format.checkpoint import Checkpoint
from paley.format.files import copy_companions, write_json
from paley.format.publish import RESULTS
from paley.format.rope import with_older_keys
from paley.format.writer import ShardWriter
from paley.model.keys import MEAN_KEYS
from paley.model.loading import check_fit, empty_model, join_tie, read_config
from paley.model.walk import sites_of

__all__ = ["Recoding", "groups_of", "recode", "words"]

_SHARD = 2**28  # bytes; a shard is in memory while it fills

_CARD = """\
---
tags: [paley, {run}]
---

# A {model_type} model in {format}

`paley export` made this folder from the quantized folder `{folder}`. Its weights are the very codes of that folder
({grids}); {size:,} bytes of tensors.

{usage}
{notes}"""


class Recoding(Protocol):
    """One format. to: its name for `paley export`; name: in sentences; usage: how it is read, for the card."""

    to: str
    name: str
    usage: str
    way_out: str

    def why_not(self, site: Site, weight: WeightScheme) -> str | None:
        """What of a weight's grid and groups the format cannot hold."""
        ...

    def tensors(self, site: Site, weight: WeightScheme, stored: Checkpoint) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) that hold the weight there."""
        ...

    def section(self, weights: Mapping[str, WeightScheme], kept: list[str]) -> dict[str, Any]:
        """What config.json says of these weights; kept: linear layers and the like that are not quantized."""
        ...

    def notes(self, dtype: str) -> list[str]:
        """What is not exactly as it was; dtype: the config's."""
        ...


def recode(
    recoding: Recoding,
    path: str | Path,
    *,
    output: str | Path,
    weights_only: bool = False,
    overwrite: bool = False,
    on_tensor: Callable[[int, str], None] = lambda total, name: None,
) -> Exported:
    """Writes the quantized folder `path` in the format of `recoding` to the new folder `output`.

    Errors: PaleyError, with nothing in `output`: before any work for what the format cannot hold.
    """
    folder, output, run = Path(path), Path(output), f"export {recoding.to}"
    place = place_for(output, folder, overwrite=overwrite)
    source = QuantizedFolder.open(folder, weights_only=weights_only, what=recoding.name)
    model_config = read_config(folder)
    model = empty_model(model_config)
    found = sites_of(model)
    stored = join_tie(folder, source.stored, found)
    if source.section.stream is not None:
        raise PaleyError(f"its residual stream turns at run time, which {recoding.name} cannot say", where=folder,
                         remedy=recoding.way_out)  # fmt: skip
    weights = {}
    for name, scheme in source.section.linears.items():
        if name not in found:
            raise PaleyError("is no weight of this model", where=f"{folder}: {name}")
        problem = _why_not(scheme, recoding.name)
        if problem is None and scheme.weight is not None:
            weights[name] = scheme.weight
            problem = recoding.why_not(found[name], scheme.weight)
        if problem is not None:
            raise PaleyError(problem, where=f"{folder}: {name}", remedy=recoding.way_out)
    means = {f"{name}.{part}" for name in source.section.attentions for part in MEAN_KEYS}
    taken = {name + part for name in weights for part in spec.PARTS} | means
    plain = [name for name in stored if name not in taken]
    carried = {*source.section.carried}
    shapes: dict[str, tuple[int, ...]] = {name: stored.shape(name) for name in plain if name not in carried}
    for name in weights:
        rows, site = stored.shape(name + spec.CODES)[0], found[name]
        shapes[site.tensor] = (rows, site.shape[1])
    check_fit(folder, shapes, model)
    kept = [site.name for site in found.of("linear", "head") if site.name not in weights]
    config = {key: value for key, value in source.stored.config.items() if key != "quantization_config"}
    config = with_older_keys(config) | recoding.section(weights, kept)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, weight in weights.items():
            spec.decode_linear(name, stored, source.section.linears[name], found[name].shape[1])  # checks its values
            yield from recoding.tensors(found[name], weight, stored)
        yield from ((name, stored.tensor(name)) for name in plain)

    try:
        with place.open(run, overwrite=overwrite) as work:
            with ShardWriter(work.new, max_shard_bytes=_SHARD) as writer:
                for name, tensor in tensors():
                    writer.add(name, tensor, own=True)
                    on_tensor(len(plain) + 3 * len(weights), name)
            write_json(work.new / "config.json", config)
            copy_companions(folder, work.new)
            made = Exported(
                output, source.dropped, source.stored.nbytes, Checkpoint.open(work.new).nbytes,
                notes=tuple(recoding.notes(str(config.get("dtype") or config.get("torch_dtype")))),
            )  # fmt: skip
            _describe(work.new, recoding, source, config, made)
            return replace(made, leftover=work.publish())
    except OSError as error:
        raise PaleyError(f"{output}: cannot be written: {error.strerror or error}") from error


def _why_not(scheme: LinearScheme, name: str) -> str | None:
    if scheme.transform is not None:
        return f"its input turns at run time, which {name} cannot say"
    if scheme.outliers:
        return f"{scheme.outliers} of its columns have a grid of their own, which {name} cannot say"
    return None


def whole_bits(weight: WeightScheme) -> int | None:
    """The bits of an evenly spaced grid with 2^bits points one apart; None: it is another one."""
    grid = weight.grid
    if not isinstance(grid, Grid) or grid.step != 1 or grid.size != 1 << round(grid.bits):
        return None
    return round(grid.bits)


def words(packed: Tensor) -> Tensor:
    """packed uint8 [rows, bytes] -> the same bits as int32 [rows, ceil(bytes / 4)]."""
    return torch.nn.functional.pad(packed, (0, -packed.shape[1] % 4)).contiguous().view(torch.int32)


def _describe(new: Path, recoding: Recoding, source: QuantizedFolder, config: dict[str, Any], made: Exported) -> None:
    """results.json and the card: where this folder came from. plan.json says which texts the model was tuned on."""
    folder = source.path.resolve().name
    about = {"quantized_bytes": made.quantized_bytes, "bytes": made.bytes, "dropped": list(made.dropped)}
    write_json(new / RESULTS, {"run": f"export {recoding.to}", "from": folder, **about, "notes": list(made.notes)})
    notes = [f"Left out: {what}." for what in made.dropped] + [f"Not exact: {what}." for what in made.notes]
    card = _CARD.format(
        run=recoding.to, model_type=config.get("model_type"), format=recoding.name, folder=folder, grids=source.grids,
        size=made.bytes, usage=recoding.usage, notes="".join(f"\n{note}\n" for note in notes),
    )  # fmt: skip
    write_atomic(new / "README.md", card)
    if (plan := source.path / "plan.json").is_file():
        shutil.copyfile(plan, new / "plan.json")


def groups_of(weights: Mapping[str, WeightScheme]) -> Counter[tuple[int, int | None]]:
    """(bits, group size) of the weights, and how many have them."""
    return Counter((round(weight.grid.bits), weight.group_size) for weight in weights.values())
