"""Text that a model samples from itself: calibration without data (LLM-QAT, arXiv:2305.17888).

A chat model is given the opening of its template alone, and writes what the user says, too (Magpie, arXiv:2406.08464).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import cycle
from typing import Any, cast

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from paley.core.errors import PaleyError, Setting
from paley.eval.scoring import check_mode
from paley.model.kv_cache import cache_argument
from paley.model.pieces import pieces_of

__all__ = ["sample_documents"]

_TURNS = ("\ue001", "\ue002", "\ue003")  # characters of nobody's alphabet, which a template leaves as they are


@dataclass(frozen=True)
class _Frame:
    """What a text has beside what the model draws.

    opening: the ids that it begins with. joints: the ids from the end of one turn to the beginning of the next, for
    each turn in a cycle. A turn ends if the model draws the first id of its joint, or one of `ends`.
    """

    opening: list[int]
    joints: tuple[list[int], ...]
    ends: frozenset[int] = frozenset()


@torch.no_grad()
def sample_documents(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int,
    tokens: int,
    seed: int,
    batch: int = 32,
) -> Tensor:
    """-> ids int64 [count, tokens] on the CPU: `count` texts sampled at temperature 1.

    If the tokenizer has a chat template, each is a conversation: the template's own words, and turns of user and
    assistant that the model draws. Else each begins with BOS, and after EOS it continues with BOS, as a new document.
    BOS is the tokenizer's, else the model config's. Each text has its own generator, drawn from `seed`.
    """
    if count < 1 or tokens < 2 or batch < 1:
        raise PaleyError(f"sampling: needs count >= 1, tokens >= 2 and batch >= 1, got {count=}, {tokens=}, {batch=}")
    check_mode(model)
    frame = _documents(model, tokenizer) if tokenizer.chat_template is None else _conversation(tokenizer)
    if len(frame.opening) >= tokens:
        raise PaleyError(
            f"sampling: the chat template opens with {len(frame.opening)} tokens, which leaves none of {tokens}",
            remedy=("use more with ", Setting("calibration.seq_len")),
        )
    # Drawn, not seed + i: neighbouring seeds would have all texts but one in common.
    seeds = torch.randint(2**62, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    parts = [_sample_batch(model, generators[at : at + batch], tokens, frame) for at in range(0, count, batch)]
    return torch.cat(parts)


def _sample_batch(model: PreTrainedModel, generators: list[torch.Generator], tokens: int, frame: _Frame) -> Tensor:
    """-> ids [len(generators), tokens], sampled token by token for all rows."""
    cache = DynamicCache(config=model.config)
    start = len(frame.opening)
    ids = torch.empty(len(generators), tokens, dtype=torch.int64)
    ids[:, :start] = torch.tensor(frame.opening)
    forced, joints = [deque[int]() for _ in generators], [cycle(frame.joints) for _ in generators]
    now = [next(joint) for joint in joints]
    read = 0
    for t in range(start, tokens):
        logits = _next_logits(model, cache, ids[:, :t].to(model.device), read)
        read = t
        # On the CPU: its generators give the same numbers whatever the model's device.
        below = logits.float().softmax(-1).cpu().cumsum(-1, dtype=torch.float64)
        if not below[:, -1].isfinite().all():
            raise PaleyError(
                f"sampling: the model's logits are NaN or infinite at position {t - 1}; look for NaN in its "
                "weights, or use dtype float32 where float16 overflows"
            )
        chances = torch.cat([torch.rand(1, dtype=torch.float64, generator=g) for g in generators])
        drawn = torch.searchsorted(below, (chances * below[:, -1])[:, None], right=True)[:, 0].tolist()
        for row, token in enumerate(drawn):
            if not forced[row]:
                ended = token == now[row][0] or token in frame.ends
                forced[row].extend(now[row] if ended else [token])
                if ended:
                    now[row] = next(joints[row])
            ids[row, t] = forced[row].popleft()
    return ids


def _next_logits(model: PreTrainedModel, cache: DynamicCache, ids: Tensor, read: int) -> Tensor:
    """ids [batch, tokens], of which the cache has read so many -> [batch, vocabulary]."""
    pieces, logits = pieces_of(model), ids.new_empty(0)
    if not pieces.cache:
        return model(ids, use_cache=False).logits[:, -1]
    for part, more in pieces.parts(ids[:, read:], read):
        logits = model(part, use_cache=True, logits_to_keep=1, **more, **cache_argument(model, cache)).logits[:, -1]
    return logits


def _documents(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> _Frame:
    """Each begins with BOS; after EOS comes BOS, unless one token is both (it then begins the next document)."""
    bos: Any = tokenizer.bos_token_id
    if bos is None:
        bos = getattr(model.config, "bos_token_id", None)
    if not isinstance(bos, int):
        raise PaleyError(
            "sampling: neither the tokenizer nor the model's config has a BOS token to start from; calibrate "
            "on a text instead (calibration.source)"
        )
    eos = tokenizer.eos_token_id
    return _Frame([bos], ([eos, bos] if isinstance(eos, int) and eos != bos else [bos],))


def _conversation(tokenizer: PreTrainedTokenizerBase) -> _Frame:
    """The words of a chat template before, between and after the turns of user and assistant."""
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": text} for role, text in zip(roles, _TURNS, strict=True)]
    try:
        rest = cast(str, tokenizer.apply_chat_template(messages, tokenize=False))
        parts = []
        for turn in _TURNS:
            part, rest = rest.split(turn)
            parts.append(cast(list[int], tokenizer(part, add_special_tokens=False)["input_ids"]))
    except (TemplateError, ValueError, TypeError) as error:  # not three parts: a template that changes what is said
        raise PaleyError(
            f"sampling: the chat template takes no conversation of user and assistant ({error})",
            remedy=("calibrate on a text (", Setting("calibration.source"), ")"),
        ) from error
    opening, *joints = parts
    if not all(parts):
        raise PaleyError(
            "sampling: the chat template puts nothing between the turns of user and assistant",
            remedy=("calibrate on a text (", Setting("calibration.source"), ")"),
        )
    eos = tokenizer.eos_token_id
    return _Frame(opening, tuple(joints), frozenset([eos] if isinstance(eos, int) else []))
