"""llama.cpp as a reader of our GGUF files, by the wheel that has it built; skips the test if that is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

__all__ = ["LlamaCpp", "open_llama_cpp"]


class LlamaCpp:
    """An open file. Weights are as stored; what linears read is rounded to 8 bits."""

    def __init__(self, internals: Any, api: Any, file: Path, tokens: int):
        self._api, self._internals = api, internals
        self._model = internals.IkModel(str(file))
        self._context = internals.IkContext(self._model, n_ctx=tokens, n_threads=1, flash_attn=False)

    def tokens(self, text: str) -> list[int]:
        """Of a text with its bos, and special tokens taken as such."""
        return self._model.tokenize(text, add_bos=True, special=True)

    def logits(self, ids: list[int]) -> Tensor:
        """[tokens, vocabulary]."""
        batch = self._internals.make_batch(ids)
        for index in range(len(ids)):
            batch.logits[index] = 1
        self._context.kv_cache_clear()
        assert self._context.decode(batch) == 0
        shape = (self._model.n_vocab,)
        rows = [np.ctypeslib.as_array(self._context.get_logits(i), shape=shape).copy() for i in range(len(ids))]
        self._api.llama_batch_free(batch)
        return torch.from_numpy(np.stack(rows))

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """The most likely tokens, one after the other."""
        for _ in range(count):
            ids = [*ids, int(self.logits(ids)[-1].argmax())]
        return ids[-count:]

    def close(self) -> None:
        self._context.close()
        self._model.close()


@contextmanager
def open_llama_cpp(file: Path, tokens: int = 256) -> Iterator[LlamaCpp]:
    why = "llama.cpp is missing: pip install ik-llama-cpp-python==0.1.5"
    internals = pytest.importorskip("ik_llama_cpp._internals", reason=why)
    api = pytest.importorskip("ik_llama_cpp._ctypes_api", reason=why)
    opened = LlamaCpp(internals, api, file, tokens)
    try:
        yield opened
    finally:
        opened.close()
