"""Messages become tokens by a model's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from paley.core.errors import Call, PaleyError

__all__ = ["Message", "chat_ids"]

Message = dict[str, str]  # role: system, user or assistant; content


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """The tokens of a conversation, up to where the assistant's next answer begins.

    Errors: PaleyError where the model has no chat template, or its template refuses these messages.
    """
    if tokenizer.chat_template is None:
        raise PaleyError(
            "this model has no chat template: it continues texts, and was not trained to answer",
            remedy=("use ", Call("generate"), ", or an instruct model"),
        )
    try:
        text = cast(
            str, tokenizer.apply_chat_template(cast(Any, list(messages)), tokenize=False, add_generation_prompt=True)
        )
    except (TemplateError, ValueError, TypeError, LookupError, AttributeError) as error:  # anybody's template
        raise PaleyError(
            f"the model's chat template does not take these messages ({' '.join(str(error).split())[:200]})",
            remedy="user and assistant take turns, and some models know no system prompt",
        ) from error
    ids = cast(list[int], tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if not ids:
        raise PaleyError("the model's chat template makes no token of these messages")
    return ids
