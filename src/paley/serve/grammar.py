"""Answers that follow a JSON schema: before a token is drawn, llguidance tells which tokens may come next."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.hf import from_tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from paley.core.errors import PaleyError
from paley.pipeline.opening import TextModel

__all__ = ["Grammar", "Grammars"]

# As json.dumps writes it. Free whitespace is what small models never stop to write.
_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammar:
    """One text that follows a schema; a `Constraint`."""

    def __init__(self, matcher: LLMatcher, vocabulary: int):
        self._matcher, self._vocabulary = matcher, vocabulary

    def fresh(self) -> Grammar:
        """The same grammar for another text, from its beginning."""
        return Grammar(self._matcher.deep_copy(), self._vocabulary)

    def allowed(self) -> Tensor:
        """-> bool [vocabulary]: the tokens that may come next."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        return torch.from_numpy(np.unpackbits(bits, count=self._vocabulary, bitorder="little").view(bool))

    def take(self, token: int) -> bool:
        """The token that was drawn -> whether the text is complete, and nothing may follow."""
        self._matcher.consume_token(token)
        self._check()
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise PaleyError(
                f"response_format: this text is too much for the schema's grammar ({_why(self._matcher)})",
                remedy="use a simpler schema",
            )


class Grammars:
    """Of one model: its tokens as llguidance needs them are made at the first schema, which takes a second or two."""

    def __init__(self, model: TextModel):
        self._model = model
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None

    def of(self, schema: Mapping[str, Any]) -> Grammar:
        """PaleyError if llguidance does not support the schema, or the model's tokenizer."""
        try:
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_OPTIONS)  # type: ignore[arg-type]
        except (ValueError, RecursionError) as error:
            raise _unsupported(error) from None
        matcher = LLMatcher(self._tokens(), grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))
        matcher.compute_bitmask()  # a schema that nothing satisfies may show here only
        if matcher.is_error():
            raise _unsupported(_why(matcher))
        return Grammar(matcher, self._model.decoder.vocabulary)

    def _tokens(self) -> LLTokenizer:
        with self._lock:
            if self._tokenizer is None:
                tokenizer, vocabulary = self._model.tokenizer, self._model.decoder.vocabulary
                if not isinstance(tokenizer, PreTrainedTokenizerFast):
                    raise PaleyError(
                        "response_format: needs a model with a fast tokenizer",
                        remedy="leave it out, and say in the messages what the answer should look like",
                    )
                ends = sorted(token for token in self._model.ends if token < vocabulary)
                self._tokenizer = from_tokenizer(
                    tokenizer, n_vocab=max(vocabulary, len(tokenizer)), eos_token=ends or None
                )
            return self._tokenizer


def _why(matcher: LLMatcher) -> str:
    """On one line, without the parser's state."""
    return " ".join(matcher.get_error().removesuffix("<non-verbose/>").split())


def _unsupported(why: object) -> PaleyError:
    return PaleyError(
        f"response_format: this schema is not supported ({why})",
        remedy="leave out what is named, or ask for {'type': 'json_object'}",
    )
