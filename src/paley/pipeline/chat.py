"""`paley.Chat`: a conversation with a model, which remembers what was said and keeps its cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from paley.core.errors import PaleyError
from paley.pipeline.continuation import ContextPool, Continuation
from paley.pipeline.conversation import Message, chat_ids
from paley.pipeline.detokenizing import StopFinder
from paley.pipeline.generate import Generated, check_tokens, run
from paley.pipeline.opening import TextModel, open_text_model
from paley.pipeline.sampling import Sampling

__all__ = ["Chat"]


class Chat:
    """A conversation; `messages` holds it, the system prompt first.

    model and the other parameters are those of `paley.generate`. An answer has at most max_new_tokens, and ends
    where the model's context does. Errors: PaleyError if the model has no chat template.
    """

    def __init__(
        self, model: PreTrainedModel | TextModel | str | Path, *, tokenizer: PreTrainedTokenizerBase | None = None,
        system: str | None = None, max_new_tokens: int = 512, sampling: Sampling | None = None,
        stop: Sequence[str] = (), device: str = "cpu",
    ):  # fmt: skip
        self.model = model if isinstance(model, TextModel) else open_text_model(model, device, tokenizer)
        self.system, self.sampling = system, sampling or Sampling()
        self.max_new_tokens, self.stop = max_new_tokens, tuple(stop)
        StopFinder(self.stop)  # refuses empty ones now
        self._pool = ContextPool(self.model.decoder, 1)
        self.reset()
        chat_ids(self.model.tokenizer, [*self.messages, {"role": "user", "content": "Hello"}])  # can it chat at all?

    def reset(self) -> None:
        """Forgets all that was said, but the system prompt."""
        self.messages: list[Message] = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.last: Generated | None = None

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes of the cache that is kept between answers."""
        return self._pool.nbytes

    def say(self, text: str, *, write: Callable[[str], None] | None = None) -> Generated:
        """The answer to what a user says; write gets each piece of it as it comes.

        If it is interrupted (KeyboardInterrupt), what came so far stays in `messages`, and the chat can go on.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        ids = chat_ids(self.model.tokenizer, asked)
        check_tokens(self.model, ids)
        limit = self.model.decoder.limit
        room = self.max_new_tokens if limit is None else min(self.max_new_tokens, limit - len(ids))
        if room < 1:
            raise PaleyError(
                f"the conversation has {len(ids)} tokens, and this model reads {limit} (max_position_embeddings)",
                remedy="reset the conversation, or say less",
            )
        pieces: list[str] = []

        def keep(piece: str) -> None:
            pieces.append(piece)
            if write is not None:
                write(piece)

        going = Continuation(
            self.model, ids, sampling=self.sampling, max_new_tokens=room, stop=self.stop, context=self._pool.take(ids)
        )
        try:
            self.last = run(self.model, going, keep)
        except KeyboardInterrupt:
            if rest := going.rest():
                keep(rest)
            raise
        finally:
            self._pool.put(going.context, going.read_ids)
            if pieces:
                self.messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]
        return self.last

    def close(self) -> None:
        """Frees the cache."""
        self._pool.close()
