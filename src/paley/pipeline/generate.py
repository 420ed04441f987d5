"""`paley.generate`: text from a model through the packed KV cache, timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from paley.core.errors import PaleyError, Setting
from paley.pipeline.continuation import Continuation, check_room, step
from paley.pipeline.conversation import chat_ids
from paley.pipeline.opening import TextModel, open_text_model
from paley.pipeline.sampling import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Generated", "check_tokens", "generate", "prompt_ids", "run"]


@dataclass(frozen=True)
class Generated:
    """What came after the prompt; prompt_seconds: to the first new token, seconds: from it to the last.

    finish: "stop" after the end of the text or a stop string, "length" after max_new_tokens. reused_tokens: those of
    the prompt that a cache held already. engine: "native", or "transformers" for a reason.
    """

    text: str
    prompt_tokens: int
    tokens: int
    prompt_seconds: float
    seconds: float
    kv_cache_bytes: int
    finish: str
    reused_tokens: int = 0
    engine: str = "transformers"
    reason: str | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """Without the prompt and the first token; None if there is no second one."""
        return (self.tokens - 1) / self.seconds if self.tokens > 1 and self.seconds > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return vars(self) | {"tokens_per_second": self.tokens_per_second}


def generate(
    model: PreTrainedModel | TextModel | str | Path,
    prompt: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
    chat: bool = False,
    system: str | None = None,
    device: str = "cpu",
    write: Callable[[str], None] | None = None,
) -> Generated:
    """Continues the prompt; temperature 0 takes the most likely token each time, else `seed` draws (see `Sampling`).

    model: a quantized folder, any other model's folder or Hub name, which is put on `device`; a model in memory with
    its tokenizer; or what `open_text_model` gave. chat: the prompt is what a user says, and the model's chat template
    is put around it and `system`. stop: texts that end the answer, without being a part of it.
    write gets each piece of the text as it comes. torch's own random state is left as it was.
    """
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty, seed=seed
    )
    if system is not None and not chat:
        raise PaleyError(Setting("system"), ": belongs to a chat", remedy=("give ", Setting("chat", True), " as well"))
    if not isinstance(model, TextModel):
        model = open_text_model(model, device, tokenizer)
    if chat:
        ids = chat_ids(model.tokenizer, [*_system(system), {"role": "user", "content": prompt}])
    else:
        ids = prompt_ids(model.tokenizer, prompt)
    check_tokens(model, ids)
    check_room(model.decoder, len(ids), max_new_tokens)
    text = Continuation(model, ids, sampling=sampling, max_new_tokens=max_new_tokens, stop=stop, continues=not chat)
    try:
        return run(model, text, write)
    finally:
        text.context.close()


def run(model: TextModel, text: Continuation, write: Callable[[str], None] | None = None) -> Generated:
    """Continues a text to its end."""
    pieces: list[str] = []
    while text.finish is None:
        (piece,) = step(model.decoder, [text])
        if piece:
            pieces.append(piece)
            if write is not None:
                write(piece)
    return Generated(
        text="".join(pieces),
        prompt_tokens=text.prompt_tokens,
        tokens=len(text.drawn),
        prompt_seconds=text.first - text.began,
        seconds=text.last - text.first,
        kv_cache_bytes=text.context.nbytes,
        finish=text.finish,
        reused_tokens=text.reused_tokens,
        engine=model.engine,
        reason=model.reason,
    )


def _system(text: str | None) -> list[dict[str, str]]:
    return [] if text is None else [{"role": "system", "content": text}]


def check_tokens(model: TextModel, ids: Sequence[int]) -> None:
    """Raises for tokens that the model has no embedding of."""
    if max(ids) >= model.decoder.vocabulary:
        raise PaleyError(
            f"prompt: the tokenizer made token {max(ids)}, but the model's vocabulary has {model.decoder.vocabulary} "
            "tokens; use the tokenizer that belongs to the model"
        )


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The prompt's tokens; a prompt without any becomes BOS."""
    ids = cast(list[int], tokenizer(prompt, verbose=False)["input_ids"])
    if not ids and isinstance(tokenizer.bos_token_id, int):
        return [tokenizer.bos_token_id]
    if not ids:
        raise PaleyError("the prompt is empty, and this model has no BOS token to begin with; give a prompt")
    return ids
