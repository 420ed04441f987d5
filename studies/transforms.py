"""What is done to weights and inputs before rounding, side by side: writes studies/results/transforms-MODEL.json.

python -m studies.transforms MODEL --text FILE --test-text FILE --seq-len 512 [--only RE]
A simulation on the model as it is: each linear multiplies Q(W M Tᵀ) with Q(T M⁻¹ x), where T is a Hadamard transform or
nothing, and M what a row's name says. "weights": p2n256 to nearest, inputs as they are; "inputs": gauss4, a scale a
token; "planes": uint4 in groups of about 128, as W(1+1)A(1×4) has them. M is made from moments of the calibration text.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from studies.experiment import Experiment
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from paley.arch import Sites
from paley.core.schemes import ActivationScheme, WeightScheme
from paley.eval.perplexity import evaluate
from paley.methods.diagonal import EVEN, balance
from paley.methods.nearest import quantize_nearest
from paley.model.adapter import Adapter
from paley.model.capture import capture_inputs
from paley.model.rotation import input_blocks
from paley.ops.rounding import round_trip

ORDER = 1024  # largest Hadamard block
BLOCK = 64
WIDEST = 2048  # of a whole matrix; wider inputs get blocks
SWEEPS = 32  # of SINQ's iteration
ROUNDS = 9  # of codes and scales in turn
WEIGHT = WeightScheme("p2n256", method="nearest", scale_search="rms")

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Moments:
    """Of one input, float64: gram [in, in] a token, mean [in]; and of all weights that read it: rows of unit rms."""

    gram: Tensor
    mean: Tensor
    weight: Tensor

    @property
    def metric(self) -> Tensor:
        return self.weight.T @ self.weight / len(self.weight)


@dataclass(frozen=True)
class Change:
    """W M along the rows of a weight, M⁻¹ x along those of an input, both [..., in]."""

    weight: Map
    input: Map


def none(_: Moments) -> Change:
    return Change(lambda w: w, lambda x: x)


def scaled(d: Tensor) -> Change:
    return Change(lambda w: w * d.to(w), lambda x: x / d.to(x))


def diagonal(moments: Moments) -> Change:
    """Ours: sqrt(x / w)."""
    return scaled(balance(moments.gram.diagonal().sqrt(), moments.weight, EVEN).double())


def columns(moments: Moments) -> Change:
    """1 / w, the same without data, in one go."""
    return scaled(balance(torch.ones_like(moments.mean), moments.weight, 0.0).double())


def sinq(moments: Moments) -> Change:
    """SINQ's column scales (arXiv:2509.22944), which go into what comes before: no data."""
    weight, d = moments.weight.clone(), torch.ones_like(moments.mean)
    for _ in range(SWEEPS):
        columns = weight.std(0).clamp(min=1e-8).sqrt()
        weight, d = weight / columns, d / columns
        weight = weight / weight.std(1, keepdim=True).clamp(min=1e-8).sqrt()
    return scaled(d)


def ordered(moments: Moments) -> Change:
    """Channels by their mean: groups hold what is alike."""
    order = moments.mean.argsort()
    return Change(lambda w: w[..., order], lambda x: x[..., order])


def blocks(moments: Moments, size: int = BLOCK) -> Change:
    """WUSH (arXiv:2512.00956): M Mᵀ is the geometric mean of the inverse of WᵀW and of x xᵀ, in blocks.

    Rows of W have unit rms. Both are balanced by the diagonal first, so that damping treats all channels alike.
    """
    d = balance(moments.gram.diagonal().sqrt(), moments.weight, EVEN).double()
    metric, gram = moments.metric * d * d[:, None], moments.gram / d / d[:, None]
    m = _geometric(_blocks(metric, size), _blocks(gram, size))
    inverse = torch.linalg.inv(m)
    return Change(lambda w: _by_blocks(w * d.to(w), m), lambda x: _by_blocks(x / d.to(x), inverse.mT))


def whole(moments: Moments) -> Change:
    return blocks(moments, len(moments.mean)) if len(moments.mean) <= WIDEST else blocks(moments)


def _blocks(a: Tensor, size: int) -> Tensor:
    """Those on the diagonal of a square matrix [n · size, n · size] -> [n, size, size]."""
    return a.unflatten(0, (-1, size)).unflatten(-1, (-1, size)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _by_blocks(x: Tensor, m: Tensor) -> Tensor:
    """x [..., n · size], m [n, size, size] -> each part of x times its matrix."""
    return (x.unflatten(-1, (len(m), 1, -1)) @ m.to(x)).flatten(-3)


def _geometric(metric: Tensor, gram: Tensor) -> Tensor:
    """-> M with M Mᵀ = metric⁻¹ # gram, [..., n, n], the symmetric root."""
    metric, gram = _damped(metric), _damped(gram)
    half, back = _power(metric, 0.5), _power(metric, -0.5)
    return _power(back @ _power(half @ gram @ half, 0.5) @ back, 0.5)


def _damped(a: Tensor, share: float = 0.01) -> Tensor:
    mean = a.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return a + share * mean * torch.eye(a.shape[-1]).to(a)


def _power(a: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(a)
    return (vectors * values.clamp(min=1e-30)[..., None, :] ** exponent) @ vectors.mT


def planes(x: Tensor) -> Tensor:
    """uint4, a scale and an offset for each token and group."""
    return round_trip(x, ActivationScheme("uint4", group_size=_group(x)))


def free_planes(x: Tensor) -> Tensor:
    """The same with a scale of its own for each of the four planes: codes and scales by least squares, in turn."""
    groups = x.unflatten(-1, (-1, _group(x))).flatten(0, -2)
    bits = torch.tensor([[*(code >> a & 1 for a in range(4)), 1] for code in range(16)]).to(x)
    return torch.cat([_freed(part, bits) for part in groups.split(4096)]).view_as(x)


def _freed(x: Tensor, bits: Tensor) -> Tensor:
    """x [n, group], bits [16, 5]"""
    low, high = x.aminmax(dim=-1, keepdim=True)
    codes = ((x - low) / (high - low).clamp(min=1e-12) * 15).round().long()
    squares = (bits[:, :, None] * bits[:, None]).flatten(1)
    scales, none = x.new_zeros(len(x), 5), x.new_zeros(len(x), 16)
    for _ in range(ROUNDS):
        counts, sums = none.scatter_add(1, codes, torch.ones_like(x)), none.scatter_add(1, codes, x)
        normal = (counts @ squares).unflatten(-1, (5, 5)) + 1e-4 * torch.eye(5)
        scales = torch.linalg.solve(normal, sums @ bits)
        points, at = (scales @ bits.T).sort(-1)
        middles = (points[:, 1:] + points[:, :-1]) / 2
        codes = at.gather(-1, torch.searchsorted(middles, x))
    return (scales @ bits.T).gather(-1, codes)


def _group(x: Tensor) -> int:
    count = next(n for n in range(round(x.shape[-1] / 128), 0, -1) if x.shape[-1] % n == 0)
    return x.shape[-1] // count


def gaussian(x: Tensor) -> Tensor:
    return round_trip(x, ActivationScheme("gauss4", scale="rms"))


class Simulated(nn.Module):
    """Stands for a linear."""

    def __init__(self, original: nn.Linear, change: Change, turn: Map, weight: Map, inputs: Map):
        super().__init__()
        self.in_features, self.out_features, self.bias = original.in_features, original.out_features, original.bias
        self._inputs: Map = lambda x: inputs(turn(change.input(x)))
        self.weight = nn.Parameter(weight(turn(change.weight(original.weight.double())).float()), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(self._inputs(x), self.weight, self.bias)


CHANGES = {
    "as it is": none, "1/w": columns, "SINQ's columns": sinq, "sqrt(x/w)": diagonal, "blocks of 64": blocks,
    "whole matrix": whole, "by mean": ordered,
}  # fmt: skip
ROUNDED: dict[str, tuple[Map, Map, tuple[str, ...]]] = {
    "weights": (lambda w: quantize_nearest(w, WEIGHT).dequantize(), lambda x: x, tuple(CHANGES)[:-1]),
    "inputs": (lambda w: w, gaussian, tuple(CHANGES)[:-1]),
    "planes": (lambda w: w, planes, ("as it is", "by mean", "sqrt(x/w)")),
    "planes of free scales": (lambda w: w, free_planes, ("as it is", "by mean", "sqrt(x/w)")),
}


@dataclass(frozen=True)
class Row:
    """make: of M; turned: a Hadamard transform follows; weight, inputs: what rounds them."""

    name: str
    make: Callable[[Moments], Change]
    turned: bool
    weight: Map
    inputs: Map


def rows() -> Iterator[Row]:
    for kind, (weight, inputs, names) in ROUNDED.items():
        for name in names:
            yield Row(f"{kind}: {name}", CHANGES[name], False, weight, inputs)
            if name != "by mean":
                yield Row(f"{kind}: {name}, Hadamard", CHANGES[name], True, weight, inputs)


@torch.no_grad()
def measure(model: PreTrainedModel, ids: Tensor) -> dict[str, Moments]:
    """By the name of each input, of ids [sequences, seq_len]."""
    adapter = Adapter(model)
    first = {site.readers[0]: site for site in _inputs(adapter.sites)}
    sums: dict[str, list[Tensor]] = {}

    def add(name: str, x: Tensor) -> None:
        x = x.flatten(0, -2)
        gram, mean = x.T @ x, x.sum(0)
        known = sums.setdefault(name, [gram.double() * 0, mean.double() * 0])
        known[0] += gram
        known[1] += mean

    with capture_inputs({name: adapter.module(adapter.sites[name].module) for name in first}, add):
        for part in ids.split(2):
            model(input_ids=part, use_cache=False)
    found = {}
    for name, (gram, mean) in sums.items():
        weight = torch.cat([adapter.module(adapter.sites[n].module).weight for n in first[name].readers]).double()
        weight = weight / weight.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12)
        found[first[name].name] = Moments(gram / ids.numel(), mean / ids.numel(), weight)
    return found


def _inputs(sites: Sites) -> list:
    """Those of the blocks' linears."""
    return [site for site in sites.of("input") if site.block is not None]


def main() -> None:
    parser = Experiment.parser(__doc__, calibration=16, search=0, test=8)
    experiment = Experiment("transforms", parser.parse_args())
    text, test = experiment.blocks.calibration, experiment.blocks.test
    assert text is not None
    assert test is not None
    moments = measure(experiment.source.load(), text.ids)

    def score(row: Row) -> dict:
        start = time.time()
        model = experiment.source.load()
        sites = Adapter(model).sites
        for site in _inputs(sites):
            change = row.make(moments[site.name])
            turn: Map = input_blocks(site.shape[-1], ORDER, 0).apply if row.turned else lambda x: x
            for reader in site.readers:
                path = sites[reader].module
                original: Any = model.get_submodule(path)
                model.set_submodule(path, Simulated(original, change, turn, row.weight, row.inputs))
        found = evaluate(model, test, experiment.reference).to_dict()
        return found | {"bits": 4.0, "seconds": {"in all": round(time.time() - start, 1)}}

    for row in rows():
        experiment.row(row.name, functools.partial(score, row))


if __name__ == "__main__":
    main()
