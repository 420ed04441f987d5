"""How much less a weight loses by GPTQ than its slope says, in closed form: see `methods.gptq`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from paley.arch import Site
from paley.core.schemes import LinearScheme
from paley.methods.diagonal import balance, strength_for
from paley.methods.statistics import InputStatistics, Metric
from paley.model.adapter import Adapter
from paley.model.capture import capture_inputs

__all__ = ["feedback_gains"]

_HELD = 2**29  # bytes of sums that are taken in one pass over the text


@torch.no_grad()
def feedback_gains(adapter: Adapter, ids: Tensor, linears: Mapping[str, LinearScheme]) -> dict[str, float]:
    """Name of each linear by GPTQ -> what its slope is multiplied by.

    adapter: of the unquantized model. ids [sequences, seq_len]: the text that GPTQ sees. An error of t^2 in each column
    costs in proportion to the Gram matrix' diagonal, and where the columns behind make up for it to 1 / U_jj^2, with
    U^T U the inverse of that matrix. Linears whose inputs no hook sees, as those of experts, get the geometric mean of
    the others.
    """
    wanted = [name for name, s in linears.items() if s.weight is not None and s.weight.method == "gptq"]
    read = {
        site: names
        for site in adapter.sites.of("input")
        if (names := [name for name in site.readers if name in wanted])
        and isinstance(adapter.module(names[0]), nn.Module)
    }
    found: dict[str, float] = {}
    for sites in _parts(read):
        sums = _sums(adapter, ids, {site.name: adapter.module(read[site][0]) for site in sites})
        for site in sites:
            if sums[site.name].tokens:
                found |= dict.fromkeys(read[site], _gain(adapter, sums.pop(site.name), read[site], linears))
    if found:
        usual = float(torch.tensor(list(found.values())).log().mean().exp())
        found |= {name: usual for name in wanted if name not in found}
    return found


def _sums(adapter: Adapter, ids: Tensor, first: dict[str, nn.Module]) -> dict[str, InputStatistics]:
    sums = {name: InputStatistics() for name in first}
    with capture_inputs(first, lambda name, x: sums[name].add(x)):
        for sequence in ids:
            adapter.model(sequence[None], use_cache=False, logits_to_keep=1)
    return sums


def _gain(adapter: Adapter, sums: InputStatistics, names: list[str], linears: Mapping[str, LinearScheme]) -> float:
    """names: of the linears that share the input."""
    gram, balanced = sums.gram, [name for name in names if linears[name].diagonal]
    if balanced:
        weights = torch.cat([adapter.module(name).weight for name in balanced])
        d = balance(gram.diagonal().double().sqrt(), weights, strength_for(linears[n] for n in balanced)).float()
        gram = gram / d / d[:, None]
    if (transform := linears[names[0]].transform) is not None:
        gram = transform.apply(transform.apply(gram).T)
    if not gram.any():  # no text reaches it
        return 1.0
    metric = Metric(gram, sums.damping * float(gram.diagonal().mean()))
    return float(metric.spread.diagonal().double().pow(-2).mean() / metric.diagonal.mean())


def _parts(sites: Iterable[Site]) -> Iterator[list[Site]]:
    """As many at a time as memory is meant for, in the order of computation."""
    part: list[Site] = []
    for site in sites:
        if part and 4 * sum(other.shape[-1] ** 2 for other in [*part, site]) > _HELD:
            yield part
            part = []
        part.append(site)
    if part:
        yield part
