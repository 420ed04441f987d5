"""What Gaussian noise at one site of a model adds to its loss, re-running only what the noise can change.

A weight is rounded by scales of its own for each row, so the noise is as large as the row that it goes into. It is
isotropic within a row, so that what rotates a row (R1, R4, HIGGS) leaves its effect as it is. What rotates a column
mixes rows: R1 all those of o_proj and down_proj, R2 those of a head in v_proj; slopes that are to hold for the rotated
model take noise of one size there. Folding the norms' gains is no rotation: it changes which weights are large, and a
model that is going to be rotated is to be measured with them folded.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from paley.arch import Site, Sites
from paley.core.errors import PaleyError, nearest_name
from paley.model.adapter import Adapter
from paley.model.capture import BlockRunner
from paley.model.stacks import Stack, Turned
from paley.model.trials import Metric, Objective, Prefix

__all__ = ["KINDS", "NoiseProbe", "mixed_rows", "noise_kind", "noise_sites"]

KINDS = ("weight", "input", "keys", "values")


def noise_sites(sites: Sites, kinds: Collection[str]) -> dict[str, Site]:
    """The sites of these kinds in the order of computation; a tied pair is one weight."""
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise PaleyError(
            f"sensitivity: unknown kind {unknown[0]!r} of sites{nearest_name(unknown[0], KINDS)}; "
            f"known are {', '.join(KINDS)}"
        )
    if not kinds:
        raise PaleyError(f"sensitivity: no kind of sites is given; known are {', '.join(KINDS)}")
    stored = {site.name for site in sites.weights}
    wanted = {name: site for name, site in sites.items() if noise_kind(site) in kinds}
    # What the head reads is never rounded.
    found = {n: s for n, s in wanted.items() if (n in stored if s.is_weight else s.block is not None)}
    if unmade := [name for name, site in found.items() if site.kind in ("keys", "values") and site.made_by is None]:
        raise PaleyError(
            f"sensitivity: {unmade[0]}: {sites.architecture.family!r} has no row that says what makes it; leave keys "
            "and values out of the kinds, or write a row (docs/adding-a-model.md)"
        )
    # What experts read has no place of its own where noise could enter.
    return {n: s for n, s in found.items() if not any(sites[path].experts for path in s.readers if path in sites)}


def noise_kind(site: Site) -> Literal["weight", "input", "keys", "values"]:
    """What a sensitivity file calls the kind of a site."""
    if site.kind == "input" or site.kind == "keys" or site.kind == "values":
        return site.kind
    return "weight"


def mixed_rows(site: Site, sites: Sites) -> int:
    """Rows of a weight that R1 and R2 mix before they are rounded, which then get noise of one size."""
    if site.adds_to_stream:
        return site.shape[0] // max(1, site.experts)
    return sites.of("values")[0].shape[1] if site.makes(sites.architecture.values) else 1


def add_noise(x: Tensor, t: float, generator: torch.Generator) -> Tensor:
    """x [..., n] -> x + t * rms(x over n) * N(0, 1): a relative squared error of t^2, in expectation, over each n."""
    rms = x.float().square().mean(-1, keepdim=True).sqrt()
    # Drawn on the CPU, whose generators give the same numbers for every device of the model.
    noise = torch.randn(x.shape, generator=generator).to(x.device)
    return (x.float() + t * rms * noise).to(x.dtype)


class NoiseProbe:
    """`delta(site, t, draw)` for the sites of an unquantized model in eval mode, on ids [sequences, seq_len].

    rotated: R1 and R2 are going to mix rows of some weights (see `mixed_rows`).
    Each (site, draw) has noise of its own, drawn from `seed`, whatever else is measured, and in whatever order.

    Perplexity is not at its minimum, so noise first moves it up or down in proportion to t, which says nothing of the
    slope and drowns it. The mean of noise and its mirror image has no such part, for twice the work. KL is at its
    minimum and needs no mirror.
    """

    def __init__(
        self, runner: BlockRunner, ids: Tensor, *,
        metric: Metric, kinds: Collection[str], rotated: bool = False, seed: int = 0,
    ):  # fmt: skip
        self.runner, self.ids, self.seed, self.rotated = runner, ids, seed, rotated
        self._signs = (1, -1) if metric == "perplexity" else (1,)
        adapter = runner.adapter
        self.sites = noise_sites(adapter.sites, kinds)
        for site in self.sites.values():
            if site.is_weight and not isinstance(module := adapter.module(site.module), _PLAIN):
                raise PaleyError(f"{site.name}: is a {type(module).__name__}; measure the original, unquantized model")
        self._prefix = Prefix(runner, ids)
        self._last = runner.suffix(0, runner.embed(ids))
        # Noise in the head must not reach the logits that it is compared with.
        head = copy.deepcopy(adapter.head) if "weight" in kinds and metric == "kl" else None
        self._objective = Objective(runner, ids, self._last, metric, head)
        self.baseline = self._objective(self._last)
        if not math.isfinite(self.baseline):
            raise PaleyError(
                f"sensitivity: the {metric} of the model as it is comes out as {self.baseline}; look for NaN in its "
                "weights, or use another text"
            )

    @torch.no_grad()
    def delta(self, name: str, t: float, draw: int) -> float:
        """What noise of relative size t at a site adds to the loss; the model is then as before, bit for bit."""
        site, losses = self.sites[name], []
        before = None if site.block is None else self._prefix.before(site.block)
        with nullcontext() if site.block is None else self.runner.held(site.block):  # where noise may go
            for sign in self._signs:
                with self.noise(name, sign * t, draw):
                    losses.append(self._objective(self._hidden(site, before)))
        return sum(losses) / len(losses) - self.baseline

    def _hidden(self, site: Site, before: Tensor | None) -> Tensor:
        """The last hidden states, computed from the first place on that noise at the site changes."""
        if before is not None:
            assert site.block is not None
            return self.runner.suffix(site.block, before)
        return self._last if site.kind == "head" else self.runner.suffix(0, self.runner.embed(self.ids))

    @contextmanager
    def noise(self, name: str, t: float, draw: int) -> Iterator[None]:
        """While open, the model computes with that noise."""
        site, adapter = self.sites[name], self.runner.adapter
        generator = torch.Generator().manual_seed(_seed(self.seed, name, draw))
        noisy = lambda x: add_noise(x, t, generator)  # noqa: E731
        if site.is_weight:
            rows = mixed_rows(site, adapter.sites) if self.rotated else 1
            opened = _in_weight(adapter, site, rows, noisy)
        else:
            opened = (_in_input if site.kind == "input" else _in_heads)(adapter, site, noisy)
        with opened:
            yield


Noisy = Callable[[Tensor], Tensor]
_PLAIN = nn.Linear | nn.Embedding | Stack | Turned


@contextmanager
def _in_weight(adapter: Adapter, site: Site, rows: int, noisy: Noisy) -> Iterator[None]:
    """rows: so many consecutive rows of the weight get noise of one size."""
    module = adapter.module(site.module)
    kept = module.weight.detach().clone()
    _write(module, noisy(kept.reshape(-1, rows * kept.shape[1])).view_as(kept))
    try:
        yield
    finally:
        _write(module, kept)


def _write(module: Any, weight: Tensor) -> None:
    if hasattr(module, "weight") and not isinstance(module, nn.Module):  # a stack, or a turned one
        module.weight = weight
        return
    own: Any = module.weight
    own.data.copy_(weight)


@contextmanager
def _in_input(adapter: Adapter, site: Site, noisy: Noisy) -> Iterator[None]:
    """Linears that share an input see one and the same noise."""
    seen: list[Tensor] = []  # the last input, and what became of it

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        if not seen or seen[0] is not args[0]:
            seen[:] = [args[0], noisy(args[0])]
        return (seen[1],)

    with ExitStack() as stack:
        for path in site.readers:
            stack.callback(adapter.model.get_submodule(path).register_forward_pre_hook(hook).remove)
        yield


@contextmanager
def _in_heads(adapter: Adapter, site: Site, noisy: Noisy) -> Iterator[None]:
    """Keys and values where they are made: RoPE turns each head, so isotropic noise before it is the same after it."""
    assert site.made_by is not None
    rows = slice(*site.rows) if site.rows else slice(None)

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        part = output[..., rows]
        output[..., rows] = noisy(part.unflatten(-1, (-1, site.shape[1]))).view_as(part)
        return output

    with ExitStack() as stack:
        stack.callback(adapter.module(site.made_by).register_forward_hook(hook).remove)
        yield


def _seed(seed: int, name: str, draw: int) -> int:
    """Far apart for neighbouring sites and draws."""
    digest = hashlib.sha256(f"{seed} {draw} {name}".encode()).digest()
    return int.from_bytes(digest[:7], "big")
