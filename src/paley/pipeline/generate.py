"""`paley.generate`: text from a model through the packed KV cache, timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from paley.core.errors import PaleyError, Setting
from paley.model.kv_cache import PackedKVCache, cache_argument
from paley.model.loading import load_tokenizer, resolve
from paley.pipeline.any_model import check_device, load_any
from paley.pipeline.texts import check_vocabulary

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
        """Without the prompt and the first token; None if there is no second one."""
        return (self.tokens - 1) / self.seconds if self.tokens > 1 and self.seconds > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return vars(self) | {"tokens_per_second": self.tokens_per_second}


class _Stream(TextStreamer):
    """Hands finished words to `write`, and notes when each token came."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None] | None):
        super().__init__(cast(Any, tokenizer), skip_prompt=True, skip_special_tokens=True)
        self.write, self.times, self.pieces = write, list[float](), list[str]()

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())  # first of all for the prompt
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.pieces.append(text)
        if self.write is not None:
            self.write(text)


def generate(
    model: PreTrainedModel | str | Path,
    prompt: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    seed: int = 0,
    device: str = "cpu",
    write: Callable[[str], None] | None = None,
) -> Generated:
    """Continues the prompt; temperature 0 takes the most likely token each time, else `seed` draws.

    model: a quantized folder, any other model's folder or Hub name, which is put on `device`; or a model in memory,
    with its tokenizer. write gets each finished word as it comes. torch's own random state is left as it was.
    """
    if not isinstance(model, PreTrainedModel):
        check_device(device)
        tokenizer = tokenizer or load_tokenizer(resolve(str(model)))
        model = load_any(model, device, kernels=True)
    if tokenizer is None:
        raise PaleyError("generate: a model in memory comes without its tokenizer", remedy="give tokenizer=")
    ids = _ids(tokenizer, prompt).to(model.device)
    check_vocabulary(ids, model.config.vocab_size, "prompt")
    _check_room(model, ids.shape[1], max_new_tokens)
    cache, stream = PackedKVCache(model), _Stream(tokenizer, write)
    # The model's own top_k and top_p would be cuts that nobody asked for.
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    # transformers draws from torch's global generator alone.
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
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
    """Raises if prompt and continuation are longer than what the model was made to read."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and prompt_tokens + new > limit:
        raise PaleyError(
            Setting("max_new_tokens", new),
            f": with a prompt of {prompt_tokens} tokens that is more than the {limit} tokens that this model reads "
            "(max_position_embeddings)",
            remedy=("use ", Setting("max_new_tokens", limit - prompt_tokens))
            if prompt_tokens < limit
            else "use a shorter prompt",
        )


def _ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> Tensor:
    """int64 [1, tokens]; a prompt without any becomes BOS."""
    ids = cast(list[int], tokenizer(prompt, verbose=False)["input_ids"])
    if not ids and isinstance(tokenizer.bos_token_id, int):
        ids = [tokenizer.bos_token_id]
    if not ids:
        raise PaleyError("the prompt is empty, and this model has no BOS token to begin with; give a prompt")
    return torch.tensor([ids])
