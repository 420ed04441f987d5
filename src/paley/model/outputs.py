"""What a model without a row computes around its head: what the head reads, and what becomes of its outputs.

The first is seen by a hook, the second tried out on a few tokens: logits are the head's outputs, times a number of the
config, or softly capped by one. Several forwards may take turns (see `pages`): a hook heeds only its own.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from greenlet import getcurrent
from torch import Tensor, nn
from transformers import PreTrainedModel

from paley.core.errors import PaleyError, Setting

__all__ = ["Finish", "Stop", "finish_of", "head_input_of"]

Finish = Callable[[Tensor], Tensor]
_FINISH = "paley_finish"  # the attribute of a model that was tried out
_TRIED = 8  # tokens
_NEAR = 1e-4  # of the largest logit


class Stop(Exception):  # noqa: N818 (a signal, not an error)
    """Ends a forward whose rest is not needed: the head's outputs for many tokens, say, are large."""


@torch.no_grad()
def head_input_of(model: PreTrainedModel, head: nn.Module, ids: Tensor, **kwargs: Any) -> Tensor:
    """ids [batch, tokens] -> what the head reads of a forward [batch, tokens, n]."""
    seen: list[Tensor] = []
    own = getcurrent()

    def stop(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        if getcurrent() is own:
            seen.append(given[0])
            raise Stop

    handle = head.register_forward_pre_hook(stop)
    try:
        model(input_ids=ids, **kwargs)
    except Stop:
        pass
    finally:
        handle.remove()
    if not seen or seen[0].shape[:2] != ids.shape:
        raise _unknown(model)
    return seen[0]


def finish_of(model: PreTrainedModel, head: nn.Module, vocabulary: int) -> Finish:
    """What makes logits of the head's outputs, tried out once for a model. vocabulary: tokens with an embedding."""
    if (found := vars(model).get(_FINISH)) is None:
        found = vars(model)[_FINISH] = _tried_out(model, head, vocabulary)
    return found


@torch.no_grad()
def _tried_out(model: PreTrainedModel, head: Any, vocabulary: int) -> Finish:
    made = list[Tensor]()
    own = getcurrent()
    device = next(chain(head.parameters(), head.buffers())).device
    ids = torch.arange(5, 5 + _TRIED, device=device)[None] % vocabulary

    def note(_: nn.Module, __: Any, out: Tensor) -> None:
        if getcurrent() is own:
            made.append(out.detach())

    handle = head.register_forward_hook(note)
    try:
        logits = model(input_ids=ids, use_cache=False).logits.double()
    finally:
        handle.remove()
    if len(made) != 1 or made[0].shape != logits.shape:
        raise _unknown(model)
    out = made[0].double()
    config = model.config.get_text_config(decoder=True).to_dict()
    numbers = [float(v) for v in config.values() if type(v) in (int, float) and v]
    ratio = float((out * logits).sum() / out.square().sum())
    near = [x for n in numbers for x in (n, 1 / n) if abs(x - ratio) <= 1e-5 * abs(ratio)]
    factor = 1.0 if abs(ratio - 1) <= 1e-5 else (near or [ratio])[0]
    caps = [float(v) for key, v in config.items() if "cap" in key and type(v) in (int, float) and v > 0]
    candidates: list[Finish] = [lambda x: x if factor == 1 else x * factor]
    candidates += [lambda x, cap=cap: (x / cap).tanh() * cap for cap in caps]
    for finish in candidates:
        if float((finish(out) - logits).abs().max()) <= _NEAR * float(logits.abs().max()):
            return finish
    raise _unknown(model)


def _unknown(model: PreTrainedModel) -> PaleyError:
    return PaleyError(
        f"architecture {model.config.model_type!r}: its logits are not its head's outputs, times a number or capped, "
        "and scores need that",
        remedy=("leave the score out: ", Setting("test", "null")),
    )
