"""How much a diagonal changes the slopes of weights and inputs, in closed form: see `methods.diagonal`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from paley.arch import Site
from paley.core.schemes import LinearScheme
from paley.methods.diagonal import balance, strength_for
from paley.model.adapter import Adapter
from paley.model.capture import capture_inputs

__all__ = ["balance_gains"]


@torch.no_grad()
def balance_gains(adapter: Adapter, ids: Tensor, linears: Mapping[str, LinearScheme]) -> dict[str, float]:
    """Name of a site -> what its slope is multiplied by; of inputs that get a diagonal, and of weights that read them.

    adapter: of the unquantized model. ids [sequences, seq_len]: tokens that show how large each channel is.
    An error of t^2 costs in proportion to |W D|^2 |x / d|^2, where it was |W|^2 |x|^2.
    """
    read = {
        site: names
        for site in adapter.sites.of("input")
        if (names := [name for name in site.readers if name in linears and linears[name].diagonal])
    }
    first = {site.name: adapter.module(names[0]) for site, names in read.items()}
    energy: dict[str, Tensor] = {}

    def add(name: str, x: Tensor) -> None:
        energy[name] = energy.get(name, 0.0) + x.double().square().sum(0)

    with capture_inputs(first, add):
        for sequence in ids:
            adapter.model(sequence[None], use_cache=False, logits_to_keep=1)
    found: dict[str, float] = {}
    for site, names in read.items():
        weights = {name: adapter.module(name).weight for name in names}
        d = balance(
            energy[site.name].sqrt(), torch.cat(list(weights.values())), strength_for(linears[n] for n in names)
        )
        found |= _gains(site, energy[site.name], weights, d.double().square())
    return found


def _gains(site: Site, energy: Tensor, weights: dict[str, Tensor], squares: Tensor) -> dict[str, float]:
    """energy [in]: sums of squares of an input's channels; weights [out, in]: all that read it; squares [in]: of d."""
    of_inputs = (energy / squares).sum() / energy.sum()

    def gain(weight: Tensor) -> float:
        rows = weight.double().square()
        columns = (rows / rows.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)).sum(0)
        return float(of_inputs * (columns * squares).sum() / columns.sum())

    own = {name: gain(weight) for name, weight in weights.items()}
    return {site.name: gain(torch.cat(list(weights.values()))), **own}
