"""Slopes of a model's KL from gradients: what small noise adds at each site, for one backward pass a text.

Up to higher orders, noise d at a site adds d' F d / 2 to the KL to the model as it is, F the Fisher information: the
mean of g g' over tokens that the model draws itself, g the gradient of their log-probability. Gradients of two tokens
are uncorrelated, so that one backward pass from the sum over a text says what all of its tokens do. Noise as
`paley.model.sensitivity` has it has variance t² rms(x)² in each value of a row x, and adds t² sum rms(x)² |g|² / 2.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from paley.arch import Site
from paley.core.errors import PaleyError, Setting
from paley.methods.sensitivity import Slope
from paley.model.adapter import Adapter
from paley.model.sensitivity import mixed_rows, noise_sites
from paley.model.stacks import Stack, Turned

__all__ = ["gradient_slopes"]

Note = Callable[[str, Tensor, Tensor], None]  # a site's rows and their gradients, [..., n]


def gradient_slopes(
    adapter: Adapter, ids: Tensor, kinds: Collection[str], *,
    rotated: bool = False, seed: int = 0, on_sequence: Callable[[], None] = lambda: None,
) -> dict[str, Slope]:  # fmt: skip
    """ids int64 [sequences, seq_len] -> the slope of KL, nats a token, of each site; stderr: over sequences.

    The model is unquantized and in eval mode. rotated: as of `NoiseProbe`. seed: of the tokens that it draws.
    Errors: PaleyError for gradients that are not finite, naming the site, and for models without gradients.
    """
    sites = noise_sites(adapter.sites, kinds)
    found: dict[str, list[float]] = {name: [] for name in sites}
    tokens = ids.shape[1] - 1

    def note(name: str, x: Tensor, gradient: Tensor) -> None:
        sizes = x.float().square().mean(-1) * gradient.float().square().sum(-1)
        found[name][-1] += float(sizes.sum(dtype=torch.float64)) / 2 / tokens

    generator = torch.Generator().manual_seed(seed)
    with _watched(adapter, sites, rotated, note):
        for sequence in ids.split(1):
            for values in found.values():
                values.append(0.0)
            _backward(adapter, sequence, generator)
            on_sequence()
    slopes = {}
    for name, values in reversed(found.items()):  # as gradients come: the first that is not finite has the cause
        each = torch.tensor(values, dtype=torch.float64)
        if not each.isfinite().all():
            raise PaleyError(
                f"sensitivity: {name}: the gradient is NaN or infinite on this text",
                remedy=("use another text, or measure with ", Setting("method", "noise")),
            )
        error = float(each.std()) / len(each) ** 0.5 if len(each) > 1 else float(each)
        slopes[name] = Slope(float(each.mean()), error, ())
    return {name: slopes[name] for name in found}


def _backward(adapter: Adapter, ids: Tensor, generator: torch.Generator) -> None:
    """ids [1, seq_len]: draws a token behind each but the last, and goes back from their log-probabilities."""
    with torch.enable_grad():
        logits = _with_gradient("the model's logits", adapter.model(input_ids=ids, use_cache=False).logits)
    chances = logits.detach()[0, :-1].float().softmax(-1)
    if not chances.isfinite().all():
        raise PaleyError(
            "sensitivity: the logits of the model as it is are NaN or infinite; look for NaN in its weights, or use "
            "another text"
        )
    drawn = torch.multinomial(chances.cpu(), 1, generator=generator).to(chances.device)
    back = torch.zeros_like(logits)
    back[0, :-1].sub_(chances)
    back[0, :-1].scatter_add_(-1, drawn, torch.ones_like(drawn, dtype=back.dtype))
    logits.backward(back)


def _with_gradient(what: str, x: Tensor) -> Tensor:
    if not x.requires_grad:
        raise PaleyError(
            f"sensitivity: {what} have no gradient: this model computes without",
            remedy=("measure with ", Setting("method", "noise")),
        )
    return x


@contextmanager
def _watched(adapter: Adapter, sites: dict[str, Site], rotated: bool, note: Note) -> Iterator[None]:
    """While open, a backward pass tells of each site; no gradient stays in memory."""
    parameters = [(parameter, parameter.requires_grad) for parameter in adapter.model.parameters()]
    adapter.model.requires_grad_(False)
    with ExitStack() as undo:
        for parameter, wanted in parameters:
            undo.callback(parameter.requires_grad_, wanted)
        # Where no weight wants a gradient, those of inputs need a beginning.
        undo.callback(adapter.embedding.register_forward_hook(_begin).remove)
        for name, site in sites.items():
            told = partial(note, name)
            if site.is_weight:
                rows = mixed_rows(site, adapter.sites) if rotated else 1
                undo.callback(_watch_weight(adapter.module(site.module), rows, told).remove)
            elif site.kind == "input":
                hook = _input_hook(name, told)
                for path in site.readers:
                    undo.callback(adapter.model.get_submodule(path).register_forward_pre_hook(hook).remove)
            else:
                assert site.made_by is not None
                undo.callback(adapter.module(site.made_by).register_forward_hook(_heads_hook(name, site, told)).remove)
        yield


def _begin(_: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output if output.requires_grad else output.requires_grad_()


def _watch_weight(module: Any, rows: int, told: Callable[[Tensor, Tensor], None]) -> Any:
    """rows: so many consecutive rows of the weight get noise of one size."""
    as_weight = module.as_weight if isinstance(module, Stack | Turned) else lambda like: like
    held: nn.Parameter = module.held if isinstance(module, Stack | Turned) else module.weight
    held.requires_grad_()

    def hook(parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        shape = (-1, rows * as_weight(parameter).shape[1])
        told(as_weight(parameter.detach()).reshape(shape), as_weight(parameter.grad).reshape(shape))
        parameter.grad = None

    return held.register_post_accumulate_grad_hook(hook)


def _input_hook(name: str, told: Callable[[Tensor, Tensor], None]) -> Callable:
    """Linears that share an input read one and the same copy of it."""
    seen: list[Tensor] = []  # the last input, and its copy

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0]
        if not seen or seen[0] is not x:
            own = _with_gradient(f"{name}'s values", x).view_as(x)
            own.register_hook(partial(told, x.detach()))
            seen[:] = [x, own]
        return (seen[1], *args[1:])

    return hook


def _heads_hook(name: str, site: Site, told: Callable[[Tensor, Tensor], None]) -> Callable:
    """Keys and values where they are made, each head by itself."""
    rows, heads = slice(*site.rows) if site.rows else slice(None), (-1, site.shape[1])

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        made = output.detach()[..., rows].unflatten(-1, heads)
        seen = _with_gradient(f"{name}'s values", output)
        seen.register_hook(lambda gradient: told(made, gradient[..., rows].unflatten(-1, heads)))

    return hook
