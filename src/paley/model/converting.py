"""Tensors that transformers converts as it loads a checkpoint, converted as they are read: experts become stacks.

Files hold one matrix for each expert, the model [experts, out, in]. Which tensors make up which is transformers' own
table; here it is applied to tensors without values, so that names and shapes are known before anything is read.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from paley.core.errors import PaleyError
from paley.format.header import TensorInfo

__all__ = ["Converted", "convert"]


@dataclass(frozen=True)
class Wanted:
    """What conversions ask of a model: its config, and parameters, without values, around those that are made."""

    config: Any
    parameters: Mapping[str, Tensor]

    def get_parameter(self, name: str) -> Tensor:
        return self.parameters[name]


@dataclass(frozen=True)
class Converted(TensorInfo):
    """One of the tensors that a conversion makes: `key` of what `operations` make of the sources, by their patterns."""

    key: str
    first: str
    converter: Any
    sources: Mapping[str, tuple[TensorInfo, ...]]
    wanted: Wanted

    def read(self) -> Tensor:
        return self._made({pattern: [info.read() for info in infos] for pattern, infos in self.sources.items()})

    def parts(self) -> Iterator[Tensor]:
        """The matrices of a stack, one in memory at a time if each has files of its own."""
        counts = {len(infos) for infos in self.sources.values()}
        if counts != {self.shape[0]}:
            yield from self.read()
            return
        for index in range(self.shape[0]):
            one = self._made({pattern: [infos[index].read()] for pattern, infos in self.sources.items()})
            yield one[0] if one.dim() == len(self.shape) else one

    def _made(self, tensors: dict[str, list[Tensor]]) -> Tensor:
        return _run(self.converter, self.first, tensors, self.wanted)[self.key].contiguous()


def convert(infos: Mapping[str, TensorInfo], model: PreTrainedModel) -> dict[str, TensorInfo]:
    """The tensors of files under the names that the model has for them, as far as transformers' table has them.

    Errors: PaleyError for tensors that do not fit together, such as experts of unequal shapes.
    """
    table = get_model_conversion_mapping(model)
    renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in table if isinstance(entry, WeightConverter)]
    wanted, base = model.state_dict(), model.base_model_prefix
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    found: dict[str, TensorInfo] = {}
    groups: dict[str, tuple[Any, dict[str, list[str]]]] = {}
    for name in sorted(infos, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, base, wanted)
        if renamed not in wanted:
            found[name] = infos[name]
        elif pattern is None:
            found[renamed] = infos[name]
        else:
            _, sources = groups.setdefault(renamed, (copy.deepcopy(by_pattern[pattern]), {}))
            sources.setdefault(pattern, []).append(name)
    for first, (converter, sources) in groups.items():
        found |= _converted(first, converter, sources, infos, model)
    return found


def _converted(
    first: str,
    converter: Any,
    sources: Mapping[str, list[str]],
    infos: Mapping[str, TensorInfo],
    model: PreTrainedModel,
) -> dict[str, TensorInfo]:
    holder = first.rpartition(".")[0]
    around = holder.rpartition(".")[0] or holder
    wanted = Wanted(model.config, {n: t for n, t in model.state_dict().items() if n.startswith(f"{around}.")})
    places = {pattern: tuple(infos[name] for name in names) for pattern, names in sources.items()}
    one = next(iter(places.values()))[0]
    names = [name for group in sources.values() for name in group]
    for pattern, group in places.items():
        if odd := [n for n, i in zip(sources[pattern], group, strict=True) if i.shape != group[0].shape]:
            raise PaleyError(
                f"{one.file}: {odd[0]} has shape {list(infos[odd[0]].shape)}, but {sources[pattern][0]} "
                f"{list(group[0].shape)}, and both are parts of {first}; get the checkpoint's original files"
            )
    empty = {
        pattern: [torch.empty(info.shape, dtype=info.dtype, device="meta") for info in group]
        for pattern, group in places.items()
    }
    try:
        made = _run(converter, first, empty, wanted)
    except Exception as error:  # each operation has its own
        raise PaleyError(
            f"{one.file}: {names[0]} and {len(names) - 1} more tensors do not make up {first}: "
            f"{' '.join(str(error).split())[:200]}; use the config.json these weights came with"
        ) from error
    return {
        key: Converted(one.file, tensor.dtype, tuple(tensor.shape), one.start, key, first, converter, places, wanted)
        for key, tensor in made.items()
    }


def _run(converter: Any, first: str, tensors: Mapping[str, list[Tensor]], wanted: Wanted) -> dict[str, Tensor]:
    one = copy.deepcopy(converter)
    for pattern, values in tensors.items():
        one.collected_tensors[pattern] = list(values)
        one.layer_targets[first].add(first)
    made = one.convert(first, model=wanted, config=wanted.config)
    return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}
