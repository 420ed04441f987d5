"""Measures mean keys on a text, and makes pairs of key dimensions equally large where queries allow it.

A diagonal s that is equal within each pair that RoPE turns together commutes with RoPE: k / s and q * s have the scores
of k and q. s^2 = rms(k) / rms(q) of a pair minimizes the sum of |q s|^2 times that of |k / s|^2, and so the error of
scores if the error of a key spreads evenly over its dimensions, as behind a Hadamard matrix it does. It is folded into
the weights, by powers of two, so that no weight is rounded by it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from paley.core.errors import PaleyError
from paley.core.schemes import AttentionScheme
from paley.model.adapter import Block
from paley.model.capture import BlockRunner
from paley.model.fold import scale_keys_
from paley.model.keys import MEAN_KEYS, KeyBase

__all__ = ["BALANCE", "TOKENS", "KeySettler"]

TOKENS = 2048  # a mean needs few
_LIMIT = 6  # octaves
BALANCE = ".key_balance"  # of a file in the run directory alone


class _Sums:
    """Sums over tokens of a text's keys and queries [kv_heads, head_dim], of keys before RoPE if the base is turned;
    all `KeyBase.halved`.
    """

    def __init__(self, base: KeyBase):
        self.base = base
        self.first = self.others = self.squares = self.queries = torch.zeros((), dtype=torch.float64)
        self.texts = self.count = 0

    def add(self, query: Tensor, key: Tensor) -> None:
        """query [batch, heads, tokens, head_dim], key [batch, kv_heads, tokens, head_dim] of whole sequences."""
        key = self.base.back(key) if self.base.turns else key.double()
        self.first = self.first + key[:, :, 0].sum(0)
        self.others = self.others + key[:, :, 1:].sum((0, 2))
        self.squares = self.squares + key[:, :, 1:].square().sum((0, 2))
        query = self.base.halved(query.double()).unflatten(1, (key.shape[1], -1))
        self.queries = self.queries + query.square().sum((0, 2, 3))
        self.texts += len(key)
        self.count += len(key) * (key.shape[2] - 1)

    def means(self) -> Tensor:
        """As the attention's buffer has them."""
        if self.base.turns:
            return self.base.unhalved(torch.stack([self.first / self.texts, self.others / self.count]))
        return (self.first + self.others) / (self.texts + self.count)

    def balance(self, *, over_heads: bool) -> Tensor:
        """s [kv_heads, head_dim], by what is left of keys without their mean; over_heads: one for all heads."""
        tokens = self.texts + self.count
        keys, queries = self.squares / self.count - (self.others / self.count).square(), self.queries / tokens
        energies, width = torch.stack([keys, queries]), self.base.width
        pairs = energies[..., :width].unflatten(-1, (2, -1)).sum(-2).repeat(1, 1, 2)
        energies = torch.cat([pairs, energies[..., width:]], -1)
        if over_heads:
            energies = energies.sum(1, keepdim=True).expand_as(energies)
        keys, queries = energies.clamp(min=torch.finfo(torch.float32).tiny)
        return self.base.unhalved((keys / queries).log2().div(4).round().clamp(-_LIMIT, _LIMIT).exp2())


class KeySettler:
    """Walks the blocks of a model whose attentions round nothing yet: measures mean keys, and balances keys.

    ids [sequences, seq_len]: a text, read in part; of the rest only first tokens are, for their own mean. round_kept:
    called with a block whose weights were changed. settled: what was done to the last block.
    """

    def __init__(
        self, runner: BlockRunner, ids: Tensor | None, schemes: Mapping[str, AttentionScheme],
        round_kept: Callable[[Block], None] = lambda _: None,
    ):  # fmt: skip
        self.runner, self.schemes, self.round_kept = runner, schemes, round_kept
        self.settled: dict[str, Tensor] = {}
        self.hidden: list[Tensor] = []
        if ids is not None and any(scheme.needs_data for scheme in schemes.values()):
            some, others = ids.tensor_split([-(-TOKENS // ids.shape[1])])
            self.hidden = [runner.embed(part) for part in (some, others[:, :1]) if len(part)]

    @torch.no_grad()
    def settle(self, block: Block, known: Mapping[str, Tensor]) -> None:
        """Settles a block's keys; known: holds what `settled` was before, if that is so."""
        scheme, adapter = self.schemes[block.attention], self.runner.adapter
        attention, sums = adapter.module(block.attention), None
        name = f"{block.attention}.{MEAN_KEYS[scheme.center_keys is True]}"
        self.settled = {key: known[key] for key in (name, block.attention + BALANCE) if key in known}
        if scheme.needs_data and not self.settled:
            if not self.hidden:
                raise PaleyError(f"{name}: needs calibration text; set center_keys=bias, or false")
            sums = _Sums(attention.key_base)
            attention.key_observer = sums.add
        try:
            self.hidden = [self.runner.run(block.module, block.index, hidden, out=hidden) for hidden in self.hidden]
        finally:
            attention.key_observer = None
        if sums is not None:
            self.settled = self._measured(block, name, scheme, sums)
        if not self.settled:
            return
        getattr(attention, name.rpartition(".")[2]).copy_(self.settled[name])
        if (scale := self.settled.get(block.attention + BALANCE)) is not None:
            scale_keys_(adapter, block, scale)
            self.round_kept(block)

    def _measured(self, block: Block, name: str, scheme: AttentionScheme, sums: _Sums) -> dict[str, Tensor]:
        row, mean, settled = self.runner.adapter.architecture, sums.means(), {}
        if scheme.balance_keys:
            scale = sums.balance(
                over_heads=any(norm.reads == row.keys and not norm.whole for norm in row.norms())
            ).float()
            settled[block.attention + BALANCE], mean = scale, mean / scale
        settled[name] = mean.half()  # as it is stored
        if not bool(settled[name].isfinite().all()):
            raise PaleyError(f"{name}: is beyond the range of float16; set center_keys=false")
        return settled
