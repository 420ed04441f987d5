"""Measures what `Measured` holds. Importing this takes transformers, so a report without an original does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from paley.data import TokenBlocks
from paley.eval.perplexity import token_scores
from paley.eval.reference import Reference
from paley.model.folders import load_tokenizer
from paley.model.linear import QuantLinear
from paley.model.loading import open_source
from paley.pipeline.any_model import load_any
from paley.pipeline.monitor import Monitor
from paley.pipeline.score import check_origin, scored_text
from paley.report.measured import Measured, Worst

__all__ = ["Original", "measure"]

_SEQUENCES, _WORST, _AROUND = 4, 12, 12


@dataclass
class Original:
    """The unquantized model; what was measured of it last is kept for other folders that are scored on those tokens."""

    path: str | Path
    _kept: tuple[str, str, Reference, dict[str, float]] | None = field(default=None, repr=False)

    def measure(self, folder: Path, blocks: TokenBlocks, monitor: Monitor) -> tuple[Reference, dict[str, float]]:
        """-> (reference, peaks as of `Measured`); PaleyError if the folder was made from another model."""
        if self._kept is None or self._kept[0] != blocks.sha256:
            self._kept = None
            monitor.stage("measuring the original", 1)
            source = open_source(self.path)
            check_origin(folder, self.path, source.fingerprint)
            model = source.load()
            reference = Reference.of(model, blocks)
            self._kept = blocks.sha256, source.fingerprint, reference, _peaks(model, blocks.ids[:1])
        _, fingerprint, reference, peaks = self._kept
        check_origin(folder, self.path, fingerprint)
        return reference, peaks


@torch.no_grad()
def measure(folder: Path, original: Original, data: str | None, monitor: Monitor) -> Measured:
    """A few sequences of the text that the folder is scored on; PaleyError as of `paley.score`."""
    blocks = scored_text(folder, data, _SEQUENCES, None, monitor)
    reference, before = original.measure(folder, blocks, monitor)
    monitor.stage("measuring this model", 1)
    model = load_any(folder)
    nll, kl, _ = token_scores(model, blocks, reference)
    after = _peaks(model, blocks.ids[:1])
    tokenizer = cast(Any, load_tokenizer(folder))
    worst = []
    for flat in kl.flatten().topk(min(_WORST, kl.numel())).indices.tolist():
        row, at = divmod(flat, kl.shape[1])
        ids = blocks.ids[row]
        parts = ids[max(0, at + 1 - _AROUND) : at + 1], ids[at + 1 : at + 2], ids[at + 2 : at + 2 + _AROUND // 2]
        before_it, token, after_it = (str(tokenizer.decode(part)) for part in parts)
        there, here = (float((-losses[row, at]).exp()) for losses in (reference.nll, nll))
        worst.append(Worst(before_it, token, after_it, float(kl[row, at]), there, here))
    peaks = {name: (before[name], after[name]) for name in before if name in after}
    return Measured(blocks.source, kl, tuple(worst), peaks)


def _peaks(model: PreTrainedModel, ids: Tensor) -> dict[str, float]:
    """Of each linear's input, after the transform of a quantized one, which is where it is rounded."""
    found: dict[str, float] = {}
    hooks = []

    def note(name: str, module: Any):
        def hook(_: Any, inputs: Sequence[Tensor]) -> None:
            x = inputs[0].flatten(0, -2).float()
            if isinstance(module, QuantLinear):
                x = x if module.diagonal is None else x / module.diagonal
                x = x if module.scheme.transform is None else module.scheme.transform.apply(x)
            found[name] = float((x.abs().amax(-1) / x.square().mean(-1).sqrt().clamp(min=1e-12)).mean())

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | QuantLinear) and not name.endswith("lm_head"):
            hooks.append(module.register_forward_pre_hook(note(name, module)))
    model.base_model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found
