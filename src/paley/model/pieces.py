"""How a model reads a text in several pieces through a cache, which transformers does not do right for every type.

Types with a row are tested. Any other model is tried out once: a short text in pieces must have the logits that it has
at once. transformers 5.24 forgets the state of Mamba, Falcon Mamba, Jamba and Zamba if several tokens come, and counts
Bamba's positions from each piece's beginning (findings/transformers_mamba_forgets_its_state_between_pieces.sh).
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from paley.arch import FAMILIES
from paley.model.kv_cache import PackedKVCache, cache_argument, takes_cache
from paley.model.loading import context_of
from paley.model.walk import sites_of

__all__ = ["Pieces", "pieces_of"]

_LOG = logging.getLogger(__name__)
_FOUND = "paley_pieces"  # the attribute of a model that was tried out
_SIZES = (6, 5, 1, 3)  # several tokens behind several, a single one, and several behind that
# Errors of the median token's logits: in float32, and if inputs or caches are rounded, or all in 16 bits, which makes
# much of small differences. Then a way must not be worse than another by more than the factor, either.
_EXACT, _ROUNDED, _WORSE = 1e-3, 0.1, 2.0


@dataclass(frozen=True)
class Pieces:
    """cache: whether tokens can be read behind others in a cache; if not, the whole text is read again each time.

    at_once: whether several can; if not, they are read one after the other. positions: whether the model has to be told
    where they are. A text's beginning can be of any length.
    """

    cache: bool = True
    at_once: bool = True
    positions: bool = False

    def parts(self, ids: Tensor, start: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """ids [batch, tokens] behind `start` others -> parts to read one after the other, and arguments of each."""
        for part in [ids] if self.at_once or start == 0 else ids.split(1, 1):
            end = start + part.shape[1]
            yield part, {"position_ids": torch.arange(start, end, device=ids.device)[None]} if self.positions else {}
            start = end


_CHOICES = (
    Pieces(), Pieces(positions=True), Pieces(at_once=False), Pieces(at_once=False, positions=True)
)  # fmt: skip


def pieces_of(model: PreTrainedModel) -> Pieces:
    """How this model reads texts in pieces; the first call for a model without a row tries it out and logs a note."""
    if model.config.model_type in FAMILIES:
        return _CHOICES[0]
    if (found := vars(model).get(_FOUND)) is None:
        found = vars(model)[_FOUND] = _tried_out(model) if takes_cache(model) else Pieces(cache=False)
        _tell(model, found)
    return found


@torch.no_grad()
def _tried_out(model: PreTrainedModel) -> Pieces:
    count, limit = sum(_SIZES), context_of(model.config)
    if limit is not None and limit < count:
        return Pieces(cache=False)
    vocabulary = sites_of(model).embedding.shape[0]
    ids = torch.randint(vocabulary, (1, count), generator=torch.Generator().manual_seed(0)).to(model.device)
    whole = model(ids, use_cache=False).logits[0].double()
    if _error(model, ids, _CHOICES[0], whole) <= _EXACT:
        return _CHOICES[0]
    known = inspect.signature(model.forward).parameters
    choices = [choice for choice in _CHOICES if not choice.positions or "position_ids" in known]
    errors = {choice: _error(model, ids, choice, whole) for choice in choices}
    most = min(_ROUNDED, _WORSE * min(errors.values())) if _rounds(model) else _EXACT
    return next((choice for choice, error in errors.items() if error <= max(most, _EXACT)), Pieces(cache=False))


def _error(model: PreTrainedModel, ids: Tensor, choice: Pieces, whole: Tensor) -> float:
    """Of the median token behind the first piece, relative; infinite if the model cannot be called so."""
    cache, rows, start = PackedKVCache(model), [], 0
    try:
        for piece in ids.split(_SIZES, 1):
            for part, more in choice.parts(piece, start):
                rows.append(model(part, use_cache=True, **more, **cache_argument(model, cache)).logits[0].double())
            start += piece.shape[1]
    except Exception as error:  # families differ in what they cannot do
        _LOG.debug("%s in pieces: %s", model.config.model_type, error)
        return torch.inf
    off = (torch.cat(rows) - whole)[_SIZES[0] :].square().mean(-1).sqrt()
    return float((off / whole[_SIZES[0] :].std(-1)).nan_to_num(torch.inf).median())


def _rounds(model: PreTrainedModel) -> bool:
    """Whether what the model computes is rounded coarsely on the way."""
    schemes = [getattr(module, name, None) for module in model.modules() for name in ("scheme", "kv_scheme")]
    kinds = (getattr(scheme, name, None) for scheme in schemes for name in ("input", "keys", "values"))
    return model.dtype != torch.float32 or any(kind is not None for kind in kinds)


def _tell(model: PreTrainedModel, found: Pieces) -> None:
    kind = model.config.model_type
    if not found.cache:
        _LOG.warning("%s: cannot go on from a cache; the whole text is read again for each token", kind)
    elif not found.at_once:
        _LOG.warning("%s: forgets earlier text if several tokens follow; they are read one after the other", kind)
