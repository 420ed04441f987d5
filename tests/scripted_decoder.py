"""A decoder whose next token is a function of the text, so that tests know each answer beforehand."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedTokenizerBase

from paley.core.errors import PaleyError
from paley.pipeline.opening import TextModel

__all__ = ["ScriptedDecoder", "chatting", "scripted_model"]


@dataclass(eq=False)
class ScriptedContext:
    """Counts 10 bytes a token; `fixed`: refuses to forget, as a window that has moved on."""

    ids: list[int] = field(default_factory=list)
    closed: bool = False
    fixed: bool = False

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def nbytes(self) -> int:
        return 10 * len(self.ids)

    def truncate(self, length: int) -> None:
        if self.fixed and length < len(self.ids):
            raise PaleyError("the window has moved on")
        del self.ids[length:]

    def close(self) -> None:
        self.closed = True


class ScriptedDecoder:
    """next_token(all ids read) -> token; `reads` notes the parts of each call, `open` the contexts not closed."""

    def __init__(
        self, next_token: Callable[[list[int]], int], *, limit: int | None = None, seconds: float = 0,
        fixed: bool = False, peak: float = 20.0,
    ):  # fmt: skip
        self._next, self.limit, self._seconds, self._fixed = next_token, limit, seconds, fixed
        self._peak = peak
        self.vocabulary = 260
        self.reads: list[list[list[int]]] = []
        self.contexts: list[ScriptedContext] = []
        self.interrupt_after = -1

    @property
    def open(self) -> list[ScriptedContext]:
        return [context for context in self.contexts if not context.closed]

    def start(self) -> ScriptedContext:
        self.contexts.append(ScriptedContext(fixed=self._fixed))
        return self.contexts[-1]

    def read(self, parts: Sequence[tuple[ScriptedContext, Sequence[int]]]) -> torch.Tensor:
        if self.interrupt_after == len(self.reads):
            self.interrupt_after = -1
            raise KeyboardInterrupt
        self.reads.append([list(tokens) for _, tokens in parts])
        time.sleep(self._seconds)
        logits = torch.zeros(len(parts), self.vocabulary)
        for row, (context, tokens) in enumerate(parts):
            assert tokens
            assert not context.closed
            logits[row, self._next([*context.ids, *tokens])] = self._peak
        for context, tokens in parts:
            context.ids += tokens
        return logits


def scripted_model(
    tokenizer: PreTrainedTokenizerBase, next_token: Callable[[list[int]], int] | str, **options: object
) -> tuple[TextModel, ScriptedDecoder]:
    """next_token: a function, or a text that follows every prompt, its tokens by their place after the prompt's end.

    A text ends with </s>. Prompts must not contain `>`: it marks their end.
    """
    if isinstance(next_token, str):
        answer, mark = [*tokenizer(next_token)["input_ids"], 2], tokenizer(">")["input_ids"][0]

        def script(ids: list[int]) -> int:
            made = len(ids) - 1 - max((i for i, token in enumerate(ids) if token == mark), default=len(ids) - 1)
            return answer[min(made, len(answer) - 1)]
    else:
        script = next_token
    decoder = ScriptedDecoder(script, **options)  # type: ignore[arg-type]
    return TextModel(decoder, tokenizer, frozenset([2])), decoder


def chatting(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy with a chat template: `role:content|` for each message, and `a>` where the answer begins."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}"
        "{{ raise_exception('unknown role ' + m.role) }}{% endif %}{{ m.role + ':' + m.content + '|' }}{% endfor %}"
        "{% if add_generation_prompt %}a>{% endif %}"
    )
    return tokenizer
