"""What Gaussian noise in one slot of a model adds to its loss, re-running only what the noise can change.

A weight is rounded by scales of its own for each row, so the noise is as large as the row that it goes into. It is
isotropic within a row, so that what rotates a row (R1, R4, HIGGS) leaves its effect as it is. What rotates a column
mixes rows: R1 all those of o_proj and down_proj, R2 those of a head in v_proj; slopes that are to hold for the rotated
model take noise of one size there. Folding the norms' gains is no rotation: it changes which weights are large, and a
model that is going to be rotated is to be measured with them folded.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from paley.core.errors import PaleyError, nearest_name
from paley.model.adapter import SHARED_INPUTS, Adapter, Block
from paley.model.capture import BlockRunner
from paley.model.trials import Metric, Objective, Prefix

__all__ = ["KINDS", "Kind", "NoiseProbe", "NoiseSlot", "noise_slots"]

Kind = Literal["weight", "input", "keys", "values"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class NoiseSlot:
    """A tensor that noise goes into; numel: entries of a weight, or values a token; roles: the linears concerned.

    rows: so many consecutive rows of a weight get noise of one size.
    """

    name: str
    kind: Kind
    block: int
    numel: int
    roles: tuple[str, ...]
    rows: int = 1


def noise_slots(adapter: Adapter, kinds: Collection[str], *, rotated: bool = False) -> list[NoiseSlot]:
    """The slots of these kinds in the order the blocks compute them; named as in plans and searches.

    rotated: R1 and R2 are going to mix the rows of some weights before these are rounded.
    """
    mixed = {"o": adapter.hidden_size, "down": adapter.hidden_size, "v": adapter.head_dim} if rotated else {}
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise PaleyError(
            f"sensitivity: unknown kind {unknown[0]!r} of slots{nearest_name(unknown[0], KINDS)}; "
            f"known are {', '.join(KINDS)}"
        )
    if not kinds:
        raise PaleyError(f"sensitivity: no kind of slots is given; known are {', '.join(KINDS)}")
    found: list[NoiseSlot] = []
    for block in adapter.blocks:
        for role, path in block.linears():
            if not isinstance(linear := block.part(role), nn.Linear):
                raise PaleyError(f"{path}: is a {type(linear).__name__}; measure the original, unquantized model")
            found.append(NoiseSlot(path, "weight", block.index, linear.weight.numel(), (role,), mixed.get(role, 1)))
        for name, roles in SHARED_INPUTS:
            width = block.part(roles[0]).in_features
            found.append(NoiseSlot(f"{block.name}.{name}_input", "input", block.index, width, roles))
        width = adapter.num_kv_heads * adapter.head_dim
        found.append(NoiseSlot(f"{block.name}.keys", "keys", block.index, width, ("k",)))
        found.append(NoiseSlot(f"{block.name}.values", "values", block.index, width, ("v",)))
    return [slot for slot in found if slot.kind in kinds]


def add_noise(x: Tensor, t: float, generator: torch.Generator) -> Tensor:
    """x [..., n] -> x + t * rms(x over n) * N(0, 1): a relative squared error of t^2, in expectation, over each n."""
    rms = x.float().square().mean(-1, keepdim=True).sqrt()
    # Drawn on the CPU, whose generators give the same numbers for every device of the model.
    noise = torch.randn(x.shape, generator=generator).to(x.device)
    return (x.float() + t * rms * noise).to(x.dtype)


class NoiseProbe:
    """`delta(slot, t, draw)` for the slots of an unquantized model in eval mode, on ids [sequences, seq_len].

    rotated: see `noise_slots`.
    Each (slot, draw) has noise of its own, drawn from `seed`, whatever else is measured, and in whatever order.

    Perplexity is not at its minimum, so noise first moves it up or down in proportion to t, which says nothing of the
    slope and drowns it. The mean of noise and its mirror image has no such part, for twice the work. KL is at its
    minimum and needs no mirror.
    """

    def __init__(
        self, runner: BlockRunner, ids: Tensor, *,
        metric: Metric, kinds: Collection[str], rotated: bool = False, seed: int = 0,
    ):  # fmt: skip
        self.runner, self.seed = runner, seed
        self._signs = (1, -1) if metric == "perplexity" else (1,)
        self.slots = {slot.name: slot for slot in noise_slots(runner.adapter, kinds, rotated=rotated)}
        self._prefix = Prefix(runner, ids)
        reference = runner.suffix(0, runner.embed(ids))
        self._objective = Objective(runner, ids, reference, metric)
        self.baseline = self._objective(reference)
        if not math.isfinite(self.baseline):
            raise PaleyError(
                f"sensitivity: the {metric} of the model as it is comes out as {self.baseline}; look for NaN in its "
                "weights, or use another text"
            )

    @torch.no_grad()
    def delta(self, slot: str, t: float, draw: int) -> float:
        """What noise of relative size t in `slot` adds to the loss; the model is then as before, bit for bit."""
        block = self.slots[slot].block
        before = self._prefix.before(block)
        losses = []
        for sign in self._signs:
            with self.noise(slot, sign * t, draw):
                losses.append(self._objective(self.runner.suffix(block, before)))
        return sum(losses) / len(losses) - self.baseline

    @contextmanager
    def noise(self, slot: str, t: float, draw: int) -> Iterator[None]:
        """While open, the model computes with that noise."""
        wanted = self.slots[slot]
        block = self.runner.adapter.blocks[wanted.block]
        generator = torch.Generator().manual_seed(_seed(self.seed, slot, draw))
        with _NOISE[wanted.kind](self.runner.adapter, block, wanted, lambda x: add_noise(x, t, generator)):
            yield


Noisy = Callable[[Tensor], Tensor]


@contextmanager
def _in_weight(adapter: Adapter, block: Block, slot: NoiseSlot, noisy: Noisy) -> Iterator[None]:
    weight = block.part(slot.roles[0]).weight.data
    kept = weight.clone()
    weight.copy_(noisy(kept.view(-1, slot.rows * kept.shape[1])).view_as(kept))
    try:
        yield
    finally:
        weight.copy_(kept)


@contextmanager
def _in_input(adapter: Adapter, block: Block, slot: NoiseSlot, noisy: Noisy) -> Iterator[None]:
    """Linears that share an input see one and the same noise."""
    seen: list[Tensor] = []  # the last input, and what became of it

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        if not seen or seen[0] is not args[0]:
            seen[:] = [args[0], noisy(args[0])]
        return (seen[1],)

    with ExitStack() as stack:
        for role in slot.roles:
            stack.callback(block.part(role).register_forward_pre_hook(hook).remove)
        yield


@contextmanager
def _in_heads(adapter: Adapter, block: Block, slot: NoiseSlot, noisy: Noisy) -> Iterator[None]:
    """Keys and values where they are made: RoPE turns each head, so isotropic noise before it is the same after it."""
    (role,) = slot.roles
    maker = dict(block.head_norms()).get(role, block.part(role))

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return noisy(output.unflatten(-1, (-1, adapter.head_dim))).view_as(output)

    with ExitStack() as stack:
        stack.callback(maker.register_forward_hook(hook).remove)
        yield


_NOISE = {"weight": _in_weight, "input": _in_input, "keys": _in_heads, "values": _in_heads}


def _seed(seed: int, slot: str, draw: int) -> int:
    """Far apart for neighbouring slots and draws."""
    digest = hashlib.sha256(f"{seed} {draw} {slot}".encode()).digest()
    return int.from_bytes(digest[:7], "big")
