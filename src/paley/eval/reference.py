"""What evaluation needs of the original model. With it, the original can leave memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from paley.core.errors import PaleyError
from paley.data import TokenBlocks
from paley.eval.scoring import (
    CHUNK,
    Slices,
    check_finite,
    check_scorable,
    few_tokens,
    head_slices,
    scores,
    slices,
)
from paley.format.writer import write_tensors
from paley.kernels.floats import quickly
from paley.model.adapter import Adapter
from paley.model.pages import Turns, one_after_another

__all__ = ["Reference"]

FORMAT = {"format": "paley-reference", "version": "1"}
MADE_AGAIN = "make it again with Reference.of"


@dataclass(frozen=True, eq=False)
class Reference:
    """hidden float32 [sequences, seq_len, hidden] after the last norm, nll float32 [sequences, seq_len - 1].

    head [vocab, hidden] and bias [vocab] are lm_head's in the model's own dtype, so that `logits` are exactly those of
    the model. sha256: of the token ids. All tensors are on the CPU, except head and bias after `to`.
    """

    hidden: Tensor
    head: Tensor
    nll: Tensor
    source: str
    sha256: str
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        if self.hidden.ndim != 3 or self.head.ndim != 2 or self.hidden.shape[2] != self.head.shape[1]:
            raise PaleyError(
                f"reference for {self.source}: needs hidden [sequences, seq_len, n] and head [vocab, n], got "
                f"{list(self.hidden.shape)} and {list(self.head.shape)}; {MADE_AGAIN}"
            )
        sequences, seq_len, _ = self.hidden.shape
        if self.nll.shape != (sequences, seq_len - 1) or not self.nll.isfinite().all():
            raise PaleyError(
                f"reference for {self.source}: needs finite nll {[sequences, seq_len - 1]}, got "
                f"{list(self.nll.shape)}; {MADE_AGAIN}"
            )

    @classmethod
    @torch.no_grad()
    @quickly
    def of(
        cls, model: PreTrainedModel, blocks: TokenBlocks, batch: int = 8, turns: Turns = one_after_another
    ) -> Reference:
        """Runs the unquantized `model` over `blocks` of any role, `batch` sequences at a time.

        turns: how batches run, if one block of the model at a time is in memory.
        """
        check_scorable(model, blocks, batch, CHUNK)
        adapter = Adapter(model)
        head = adapter.head
        if not isinstance(head, nn.Linear):
            raise PaleyError(
                f"reference: the model's lm_head is a {head}, expected a Linear; give the unquantized model"
            )
        sequences, seq_len = blocks.ids.shape
        hidden = torch.empty(sequences, seq_len, head.in_features, dtype=torch.float32)
        nll = torch.empty(sequences, seq_len - 1, dtype=torch.float32)

        def run(at: int) -> None:
            ids = blocks.ids[at : at + batch].to(adapter.device)
            last = adapter.head_input(ids, use_cache=False)
            hidden[at : at + batch] = last
            inputs, targets = last[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
            pieces = [
                scores(head_slices(head, inputs[few]), None, targets[few], adapter.finish)
                for few in few_tokens(len(targets))
            ]
            nll[at : at + batch] = torch.cat(pieces, -1).view(len(ids), -1)
            check_finite(nll[at : at + batch], at, blocks.source)

        turns([adapter.try_out])
        turns([partial(run, at) for at in range(0, sequences, batch)])
        weight = head.weight.detach().to("cpu", copy=True).contiguous()
        bias = None if head.bias is None else head.bias.detach().to("cpu", copy=True)
        return cls(hidden, weight, nll, blocks.source, blocks.sha256, bias)

    def slices(self, hidden: Tensor) -> Slices:
        """Some of `hidden` [n, hidden] -> logits in the model's dtype, on head's device; as of `scoring.slices`."""
        return slices(hidden.to(self.head), self.head, self.bias)

    def to(self, device: torch.device | str) -> Reference:
        """A copy with head on `device`, where `logits` are then computed; hidden states are moved in slices."""
        return replace(self, head=self.head.to(device), bias=None if self.bias is None else self.bias.to(device))

    def check(self, blocks: TokenBlocks, where: str = "reference") -> None:
        """Raises if this reference was made for other token ids."""
        if self.sha256 != blocks.sha256 or self.hidden.shape[:2] != blocks.ids.shape:
            raise PaleyError(
                f"{where}: made for token ids {list(self.hidden.shape[:2])} of {self.source} (sha256 "
                f"{self.sha256[:12]}), not for {list(blocks.ids.shape)} of {blocks.source} (sha256 "
                f"{blocks.sha256[:12]}); {MADE_AGAIN} for these"
            )

    def save(self, path: str | Path) -> None:
        """Writes a whole safetensors file or nothing; PaleyError if it cannot be written."""
        tensors = {"hidden": self.hidden, "head": self.head, "nll": self.nll}
        tensors |= {} if self.bias is None else {"bias": self.bias}
        write_tensors(path, tensors, FORMAT | {"source": self.source, "sha256": self.sha256})

    @classmethod
    def load(cls, path: str | Path, blocks: TokenBlocks | None = None) -> Reference:
        """Reads what `save` wrote. Errors: PaleyError for a foreign or damaged file, or one for other token ids."""
        try:
            with safe_open(path, framework="pt") as opened:
                metadata = opened.metadata() or {}
                if not (FORMAT.items() <= metadata.items() and {"source", "sha256"} <= metadata.keys()):
                    raise PaleyError(f"{path}: is no reference of this version of Paley; {MADE_AGAIN}")
                hidden, head, nll = (opened.get_tensor(name) for name in ("hidden", "head", "nll"))
                bias = opened.get_tensor("bias") if "bias" in opened.keys() else None  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise PaleyError(f"{path}: cannot be read as a reference ({error}); {MADE_AGAIN}") from error
        if hidden.dtype != torch.float32 or nll.dtype != torch.float32 or not head.is_floating_point():
            raise PaleyError(f"{path}: holds {hidden.dtype}, {head.dtype}, {nll.dtype}; {MADE_AGAIN}")
        reference = cls(hidden, head, nll, metadata["source"], metadata["sha256"], bias)
        if blocks is not None:
            reference.check(blocks, str(path))
        return reference
