"""A model seen through its sites: algorithms ask for the module at a site and never for a part of Llama."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from paley.arch import Site, Sites
from paley.model.outputs import Finish, finish_of, head_input_of
from paley.model.stacks import module_at
from paley.model.walk import sites_of

__all__ = ["Adapter", "Block"]


@dataclass(frozen=True)
class Block:
    """A decoder block: its number, its path in the model, its module, and its sites in the order of computation."""

    index: int
    name: str
    module: nn.Module
    sites: tuple[Site, ...]

    def local(self, path: str) -> str:
        """A path from the model -> the path from this block."""
        return path.removeprefix(f"{self.name}.")

    def linears(self) -> Iterator[Site]:
        return (site for site in self.sites if site.kind == "linear")

    def inputs(self) -> Iterator[Site]:
        return (site for site in self.sites if site.kind == "input")

    @property
    def attentions(self) -> list[str]:
        """Paths of attention modules whose cache can be quantized: one, or none."""
        return [site.module for site in self.sites if site.kind == "keys"]

    @property
    def attention(self) -> str:
        """Path of the attention module of a block that has one."""
        return self.attentions[0]


class Adapter:
    """A model with its row and its sites, whose shapes are those of the model as it was when this was made."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.sites: Sites = sites_of(model)
        self.architecture = self.sites.architecture
        stack = model.get_submodule(self.architecture.blocks)
        self.blocks = [
            Block(i, f"{self.architecture.blocks}.{i}", block, tuple(s for s in self.sites.values() if s.block == i))
            for i, block in enumerate(stack.children())
        ]

    def finish(self, logits: Tensor) -> Tensor:
        """What the head computes [..., vocab] -> the model's logits: divided, softly cut off, as the family has it.

        Errors: PaleyError for a model without a row that makes its logits in another way.
        """
        if self.architecture.walked:
            return self._finish()(logits)
        row, config = self.architecture, self.model.config
        if (divisor := row.number(config, "logit_divisor")) is not None:
            logits = logits / divisor
        if (cap := row.number(config, "logit_softcap")) is not None:
            logits = (logits / cap).tanh() * cap
        return logits

    def try_out(self) -> None:
        """Learns what `finish` does, by a forward: so a model of which one block is in memory needs it once."""
        if self.architecture.walked:
            self._finish()

    def _finish(self) -> Finish:
        return finish_of(self.model, self.head, self.sites.embedding.shape[0])

    def head_input(self, ids: Tensor, **kwargs: Any) -> Tensor:
        """ids [batch, tokens] -> what the head reads of a forward [batch, tokens, n]; a cache has read them then."""
        if self.architecture.walked:
            return head_input_of(self.model, self.head, ids, **kwargs)
        return self.model.base_model(ids, **kwargs).last_hidden_state

    def module(self, path: str) -> Any:
        """What is there; a stack of experts, which is a parameter, looks like a linear."""
        return module_at(self.model, path)

    @property
    def device(self) -> torch.device:
        """Where token ids go: blocks may be elsewhere, or nowhere yet."""
        return next(chain(self.embedding.parameters(), self.embedding.buffers())).device

    @property
    def embedding(self) -> Any:
        return self.module(self.architecture.embedding)

    @property
    def norm(self) -> Any:
        """The final norm."""
        return self.module(self.architecture.norm)

    @property
    def head(self) -> Any:
        return self.module(self.architecture.head)
