"""How much a diagonal and GPTQ's feedback change the slopes of weights and inputs, in closed form.

See `methods.diagonal` and `methods.gptq`. Blocks are looked at one after the other, so that no more than one is needed
in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from paley.arch import Site
from paley.core.errors import PaleyError, Setting
from paley.core.schemes import LinearScheme
from paley.methods.diagonal import balance, strength_for
from paley.methods.statistics import InputStatistics, Metric, damping_for
from paley.model.adapter import Adapter, Block
from paley.model.capture import BlockRunner, capture_inputs
from paley.model.stacks import Turned

__all__ = ["slope_gains"]


class Energy:
    """Sums of squares of an input's channels; where no feedback asks for the whole Gram matrix."""

    def __init__(self) -> None:
        self.tokens, self.diagonal = 0, torch.zeros(())

    def add(self, x: Tensor) -> None:
        self.tokens += len(x)
        self.diagonal = self.diagonal + x.double().square().sum(0)


Sums = Energy | InputStatistics


@torch.no_grad()
def slope_gains(
    runner: BlockRunner, ids: Tensor, linears: Mapping[str, LinearScheme], feedback: Collection[str] = (), *,
    begin: Callable[[Block], None] = lambda _: None, end: Callable[[Block], None] = lambda _: None,
) -> dict[str, float]:  # fmt: skip
    """Name of a site -> what its slope is multiplied by: inputs with a diagonal, their linears, linears with feedback.

    feedback: the linears of those, by GPTQ, whose columns make up for the errors of columns before them.
    runner: of the unquantized model, folded if it will be. ids [sequences, seq_len]: the text that shows what inputs
    look like, for feedback the one that GPTQ sees. begin, end: called with each block before and after its turn.
    Errors: PaleyError for inputs that are not finite, naming a linear.

    Behind a diagonal D an error of t^2 costs in proportion to |W D|^2 |x / d|^2, where it was |W|^2 |x|^2. In column j
    it costs H_jj, or 1 / U_jj^2 if the columns behind make up for it: H is the Gram matrix of the inputs, damped as it
    is there, and U^T U its inverse. Inputs that are 0 throughout gain nothing. Linears whose inputs no hook sees, as
    those of experts, gain by feedback what the others do, by the geometric mean.
    """
    adapter, hidden = runner.adapter, runner.embed(ids)
    wanted = {*feedback, *(name for name, scheme in linears.items() if scheme.diagonal)}
    balanced: dict[str, float] = {}
    fed_back: dict[str, float] = {}

    def note(site: Site, seen: Sums) -> None:
        weights = {name: adapter.module(name).weight for name in site.readers if name in linears}
        if not _is_alive(seen, next(iter(weights))):
            fed_back.update({name: 1.0 for name in weights if name in feedback})
            return
        d = _diagonal(seen, weights, linears)
        if d is not None:
            balanced.update(_by_balance(site, _squares(seen), weights, linears, d))
        if isinstance(seen, InputStatistics):
            fed_back.update(_by_feedback(seen, {name: linears[name] for name in weights if name in feedback}, d))

    for block in adapter.blocks:
        begin(block)
        readers = {site: module for site in block.inputs() if (module := _reader(adapter, site, wanted)) is not None}
        sums = {site.name: _sums(site, feedback) for site in readers}
        with capture_inputs({s.name: m for s, m in readers.items()}, lambda name, x, sums=sums: sums[name].add(x)):
            hidden = runner.run(block.module, block.index, hidden, hidden)
        for site in readers:
            note(site, sums.pop(site.name))
        end(block)
    head = next((site for site in adapter.sites.of("input") if site.block is None), None)
    if head is not None and _reader(adapter, head, wanted) is not None:
        seen = _sums(head, feedback)
        for part in hidden.split(runner.batch):
            seen.add(runner.head_input(part, adapter.head).flatten(0, -2))
        note(head, seen)
    usual = math.exp(math.fsum(map(math.log, fed_back.values())) / max(len(fed_back), 1))
    return balanced | {name: balanced.get(name, 1.0) * fed_back.get(name, usual) for name in feedback}


def _reader(adapter: Adapter, site: Site, wanted: Collection[str]) -> nn.Module | None:
    """A module that reads the input, if that is of interest and a hook sees it."""
    name = next((name for name in site.readers if name in wanted), None)
    module: Any = None if name is None else adapter.module(name)
    module = module.conv if isinstance(module, Turned) else module
    return module if isinstance(module, nn.Module) else None


def _sums(site: Site, feedback: Collection[str]) -> Sums:
    return InputStatistics() if any(name in feedback for name in site.readers) else Energy()


def _squares(seen: Sums) -> Tensor:
    """float64 [in]"""
    return seen.diagonal if isinstance(seen, Energy) else seen.gram.diagonal().double()


def _is_alive(seen: Sums, where: str) -> bool:
    """Whether the text reached the input with anything but 0."""
    if seen.tokens == 0:
        return False
    squares = _squares(seen)
    if not squares.isfinite().all():
        raise PaleyError(
            f"{where}: what it reads is NaN or infinite on the calibration text",
            remedy=("look for NaN in the weights before it, or use another text (", Setting("calibration.source"), ")"),
        )
    return bool(squares.any())


def _diagonal(seen: Sums, weights: dict[str, Tensor], linears: Mapping[str, LinearScheme]) -> Tensor | None:
    """float64 [in], as quantizing chooses it: from all linears that have one."""
    names = [name for name in weights if linears[name].diagonal]
    if not names:
        return None
    strength = strength_for(linears[name] for name in names)
    return balance(_squares(seen).sqrt(), torch.cat([weights[name] for name in names]), strength).double()


def _by_balance(
    site: Site, energy: Tensor, weights: dict[str, Tensor], linears: Mapping[str, LinearScheme], d: Tensor
) -> dict[str, float]:
    """energy [in]: sums of squares of the input's channels; weights [out, in]: all that read it."""
    squares = d.square()
    of_inputs = (energy / squares).sum() / energy.sum()

    def gain(weight: Tensor) -> float:
        rows = weight.double().square()
        columns = (rows / rows.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)).sum(0)
        return float(of_inputs * (columns * squares).sum() / columns.sum())

    own = {name: weight for name, weight in weights.items() if linears[name].diagonal}
    return {site.name: gain(torch.cat(list(own.values())))} | {name: gain(weight) for name, weight in own.items()}


def _by_feedback(seen: InputStatistics, linears: Mapping[str, LinearScheme], d: Tensor | None) -> dict[str, float]:
    alike: dict[Any, list[str]] = {}  # linears that read the same turned input
    for name, scheme in linears.items():
        alike.setdefault((scheme.diagonal, scheme.transform), []).append(name)
    gains: dict[str, float] = {}
    for (has_diagonal, transform), names in alike.items():
        gram = seen.gram
        if has_diagonal and d is not None:
            gram = gram / d.float() / d.float()[:, None]
        if transform is not None:
            gram = transform.apply(transform.apply(gram).T)
        metric = Metric(gram, damping_for(len(gram), seen.tokens) * float(gram.diagonal().mean()))
        left = metric.spread.diagonal().double().pow(-2).mean() / metric.diagonal.mean()
        gains |= dict.fromkeys(names, float(left))
    return gains
