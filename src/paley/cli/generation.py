"""Text from a model through the packed KV cache, timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from paley.core.errors import PaleyError
from paley.model.kv_cache import PackedKVCache, cache_argument

__all__ = ["Generated", "generate"]


@dataclass(frozen=True)
class Generated:
    """What came after the prompt; prompt_seconds: to the first new token, seconds: from it to the last."""

    text: str
    prompt_tokens: int
    tokens: int
    prompt_seconds: float
    seconds: float
    kv_cache_bytes: int

    @property
    def tokens_per_second(self) -> float | None:
        """Without the prompt and the first token; None where there is no second one."""
        return (self.tokens - 1) / self.seconds if self.tokens > 1 and self.seconds > 0 else None

    def summary(self) -> str:
        """One line for a person."""
        rate = self.tokens_per_second
        return (
            f"prompt: {self.prompt_tokens} tokens in {self.prompt_seconds:.2f} s; new: {self.tokens} tokens"
            + ("" if rate is None else f" at {rate:.1f} tokens/s")
            + f"; KV cache: {self.kv_cache_bytes:,} bytes"
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return vars(self) | {"tokens_per_second": self.tokens_per_second}


class _Stream(TextStreamer):
    """Hands finished words to `write`, and notes when each token came."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]):
        super().__init__(cast(Any, tokenizer), skip_prompt=True, skip_special_tokens=True)
        self.write, self.times, self.pieces = write, list[float](), list[str]()

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())  # first of all for the prompt
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.pieces.append(text)
        self.write(text)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    write: Callable[[str], None],
) -> Generated:
    """Continues the prompt; temperature 0 takes the most likely token each time, else `seed` draws."""
    ids = _ids(tokenizer, prompt).to(model.device)
    _check_room(model, ids.shape[1], max_new_tokens)
    cache, stream = PackedKVCache(model), _Stream(tokenizer, write)
    # The model's own top_k and top_p would be cuts that nobody asked for.
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    torch.manual_seed(seed)
    whole = cast(Any, model).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **cache_argument(model, cache),
        streamer=stream,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **(sampling if temperature else {"do_sample": False}),
    )
    return Generated(
        text="".join(stream.pieces),
        prompt_tokens=ids.shape[1],
        tokens=whole.shape[1] - ids.shape[1],
        prompt_seconds=stream.times[1] - stream.times[0],
        seconds=stream.times[-1] - stream.times[1],
        kv_cache_bytes=cache.nbytes,
    )


def _check_room(model: PreTrainedModel, prompt_tokens: int, new: int) -> None:
    """Raises where prompt and continuation are longer than what the model was made to read."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and prompt_tokens + new > limit:
        way_out = f"use --max-new-tokens {limit - prompt_tokens}" if prompt_tokens < limit else "use a shorter prompt"
        raise PaleyError(
            f"--max-new-tokens {new}: with a prompt of {prompt_tokens} tokens that is more than the {limit} tokens "
            f"that this model reads (max_position_embeddings); {way_out}"
        )


def _ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> Tensor:
    """int64 [1, tokens]; a prompt without any becomes BOS."""
    ids = cast(list[int], tokenizer(prompt, verbose=False)["input_ids"])
    if not ids and isinstance(tokenizer.bos_token_id, int):
        ids = [tokenizer.bos_token_id]
    if not ids:
        raise PaleyError("the prompt is empty, and this model has no BOS token to begin with; give a prompt")
    return torch.tensor([ids])
